// out = x W^T for 17 to 64 tokens on Hopper: 64 rows of W a warpgroup as operand A of wgmma, taken
// from registers, where their codes have just become levels; tokens are operand B, read by all
// warpgroups from where the copy engine put them.
//
// One thread copies codes, scales and x, a stage of 128 columns at a time, by tensor maps: x in the
// order that wgmma reads, straight from where the launch before left it. What a map does not hold
// (rows beyond the last, tokens beyond the last) arrives as 0. Codes of 32 columns are taken apart
// while the products of the 32 before them run. Blocks of a cluster split the columns. Where
// there is memory beside the ring each sends its sums to the rank that stores them, else they read
// each other's in place of the ring. They add up in the order of their ranks: the result is
// deterministic.
#pragma once

#include <type_traits>

#include "hopper.cuh"
#include "low_bit_linear.cuh"

namespace minicpm41 {
namespace cuda {

constexpr int kWarpGroup = 128;
constexpr int kGroupTiles = 4;  // tiles of kTileRows rows a warpgroup takes

struct HopperLinearParams {
  CUtensorMap codes;   // [row_tiles, k_tiles * words of a tile], boxes of kTiles tiles
  CUtensorMap scales;  // [row_tiles, groups * 8 pairs], boxes of the groups of kTileColumns columns
  CUtensorMap x;       // [in_features / 64, num_tokens, 64], boxes of 2 by the kernel's tokens
  void* out;
  int32_t num_tokens;
  int32_t out_features;
  int32_t k_tiles;
  int32_t code_words;   // numbers of a tile in the map of codes
  int32_t tile_groups;  // groups of kTileColumns columns that have scales of their own
  int32_t group_shift;  // columns to groups
  int32_t zero;
  int32_t num_stages;
  int32_t sums_at;  // in shared memory, for the sums that ranks send each other; 0: none does
};

// What a launch of one of the kernels below needs to know about it.
struct HopperLinear {
  void (*kernel)(HopperLinearParams);
  bool is_built;  // false: compiled for other devices only
  int max_tokens;
  int tiles;  // tiles of kTileRows rows a block works on
  int threads;
  int stage_bytes;     // of the ring, without scales
  int scale_bytes;     // of a stage
  int sum_bytes;       // at the end, in place of the ring
  int fragment_bytes;  // sums of 8 tokens
};

// The kernel for `num_tokens`, instantiated in w2_linear.cu, w4_linear.cu and w8_linear.cu.
HopperLinear w2_linear_sm90(int32_t dtype, int num_tokens);
HopperLinear w4_linear_sm90(int32_t dtype, int num_tokens);
HopperLinear w8_linear_sm90(int32_t dtype, int num_tokens);

constexpr int kMaxHopperStages = 24;
constexpr int kSwizzleBytes = 1024;  // what the copy engine swizzles starts on multiples of it

namespace {

#ifdef MINICPM41_HAS_WGMMA

// A box of a tensor map into shared memory; it completes on `barrier`.
__device__ __forceinline__ void copy_box(const CUtensorMap* map, uint32_t target, uint64_t* barrier,
                                         int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(target),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void copy_box(const CUtensorMap* map, uint32_t target, uint64_t* barrier,
                                         int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(target),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
      : "memory");
}

// Bytes of this block's shared memory into another's; they complete on a barrier there. This block
// stays until then.
__device__ __forceinline__ void copy_to_block(uint32_t target, const void* source, int bytes,
                                              uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(target),
      "r"(shared_address(source)), "r"(bytes), "r"(barrier)
      : "memory");
}
// Returns when all of the cluster have come here.
__device__ __forceinline__ void leave_cluster() {
  cluster_arrive();
  cluster_wait();
}

// d (+)= A B for 64 rows, 16 of them a warp, and twice as many tokens as d has numbers.
#define MINICPM41_PRODUCT(T, type)                                                                \
  template <>                                                                                     \
  __device__ __forceinline__ void product<T>(float (&d)[16], const uint32_t (&a)[4], uint32_t b,  \
                                             bool adds) {                                         \
    asm volatile(                                                                                 \
        "{\n.reg .pred adds;\n.reg .b64 b;\nsetp.ne.b32 adds, %21, 0;\nmov.b64 b, {%20, %22};\n"  \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                               \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "               \
        "{%16, %17, %18, %19}, b, adds, 1, 1, 0;\n}"                                              \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),     \
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), \
          "+f"(d[14]), "+f"(d[15])                                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(int{adds}), "n"(kOperandHigh)); \
  }
template <typename T>
__device__ void product(float (&d)[16], const uint32_t (&a)[4], uint32_t b, bool adds);
template <typename T>
__device__ __forceinline__ void product(float (&d)[32], const uint32_t (&a)[4], uint32_t b,
                                        bool adds) {
  product_64x64x16<T>(d, a, b, adds);
}
MINICPM41_PRODUCT(__half, "f16")
MINICPM41_PRODUCT(__nv_bfloat16, "bf16")
#undef MINICPM41_PRODUCT

#endif  // MINICPM41_HAS_WGMMA

__device__ __forceinline__ void add(float4& sum, const float4& part) {
  sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
}

// Stores `scale` times a product's 16 rows by 8 tokens; transposed, a lane has two rows.
template <typename T>
__device__ __forceinline__ void store_fragment(T* out, const float4& sum, float scale, int token,
                                               int num_tokens, int row, int out_features,
                                               int lane) {
  const uint32_t pairs[2] = {Pair<T>::pack(sum.x * scale, sum.y * scale),
                             Pair<T>::pack(sum.z * scale, sum.w * scale)};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t pair;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(pair) : "r"(pairs[half]));
    const int to_token = token + lane / 4;
    const int n = row + half * 8 + lane % 4 * 2;
    if (to_token >= num_tokens || n >= out_features) continue;
    T* to = out + int64_t{to_token} * out_features + n;
    if (out_features % 2 == 0) {
      *reinterpret_cast<uint32_t*>(to) = pair;
    } else {
      const T* numbers = reinterpret_cast<const T*>(&pair);
      to[0] = numbers[0];
      if (n + 1 < out_features) to[1] = numbers[1];
    }
  }
}

// Products of two pairs of numbers, each rounded to T.
template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (std::is_same<T, __half>::value) {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  } else {
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  }
  return d;
}

// kTokens tokens, kGroups warpgroups. kScalesLevels: levels are multiplied by their group's scale
// and rounded to T, as a framework rounds a weight, and one sum runs through all columns; else a
// group's exact levels are summed and the sum is multiplied.
template <typename T, int kBits, int kTokens, int kGroups>
struct HopperShape {
  static constexpr bool kScalesLevels = kTokens == 64 && std::is_same<T, __nv_bfloat16>::value;
  static constexpr int kConsumers = kGroups * kWarpGroup;
  static constexpr int kThreads = kConsumers + kWarpSize;
  // That share a multiprocessor. Sums of exact levels beside the running ones take their registers.
  static constexpr int kBlocks = kTokens == 64 && !kScalesLevels ? 1 : 2;
  static constexpr int kTiles = kGroups * kGroupTiles;
  static constexpr int kRows = kTiles * kTileRows;
  static constexpr int kTileBytes = kTileRows * kTileColumns / 8 * kBits;
  static constexpr int kXBytes = kTokens * kXRowBytes;
  static constexpr int kStageBytes = kXBytes + kTiles * kTileBytes;
  static constexpr int kScaleBytes = kTiles * kMaxGroupsPerTile * kGroupScaleBytes;
  // Sums lie token by token, padded so that a warp's tokens fall into different banks.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kSumBytes = kTokens * kSumStride * 4;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kFragmentBytes = kConsumers * 16;  // sums of 8 tokens
  static_assert(kStageBytes % kSwizzleBytes == 0, "x of each stage is swizzled");
  static_assert(kTokenTiles <= kTiles, "each warp sends those of 8 tokens");
};

template <typename T, int kBits, int kTokens, int kGroups>
__global__ void __launch_bounds__(HopperShape<T, kBits, kTokens, kGroups>::kThreads,
                                  HopperShape<T, kBits, kTokens, kGroups>::kBlocks)
    low_bit_linear_sm90_kernel(const __grid_constant__ HopperLinearParams params) {
#ifdef MINICPM41_HAS_WGMMA
  using C = HopperShape<T, kBits, kTokens, kGroups>;
  __shared__ uint64_t full[kMaxHopperStages], empty[kMaxHopperStages], received;
  extern __shared__ __align__(128) uint8_t dynamic[];
  uint8_t* const shared = dynamic + (-shared_address(dynamic) & (kSwizzleBytes - 1));
  const uint32_t base = shared_address(shared);
  const int num_stages = params.num_stages;
  const int scales_at = num_stages * C::kStageBytes;

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int ranks = cluster_size();
  const int rank = cluster_rank();
  const int first_k = params.k_tiles * rank / ranks;
  const int steps = params.k_tiles * (rank + 1) / ranks - first_k;
  const int first_tile = blockIdx.x / ranks * C::kTiles;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < num_stages; ++slot) {
      init_barrier(&full[slot], 1);
      init_barrier(&empty[slot], C::kTiles);
    }
    init_barrier(&received, 1);
    publish_barriers();
  }
  allow_next_launch();
  __syncthreads();
  const bool sends_sums = params.sums_at > 0;
  if (sends_sums) cluster_arrive();

  if (warp == C::kConsumers / kWarpSize) {
    if (lane == 0) {
      prefetch_map(&params.codes);
      prefetch_map(&params.scales);
      prefetch_map(&params.x);
      const int scale_bytes = C::kTiles * params.tile_groups * kGroupScaleBytes;
      const auto copy_weights = [&](int slot, int step) {
        const int k_tile = first_k + step;
        arrive_expecting(&full[slot], C::kStageBytes + scale_bytes);
        copy_box(&params.codes, base + slot * C::kStageBytes + C::kXBytes, &full[slot],
                 k_tile * params.code_words, first_tile);
        copy_box(&params.scales, base + scales_at + slot * C::kScaleBytes, &full[slot],
                 ((k_tile * kTileColumns) >> params.group_shift) * kTileRows / 2, first_tile);
      };
      const auto copy_x = [&](int slot, int step) {
        copy_box(&params.x, base + slot * C::kStageBytes, &full[slot], 0, 0, 2 * (first_k + step));
      };
      // No earlier launch writes weights: as many as there is room for come before its end.
      const int ahead = min(steps, num_stages);
      for (int i = 0; i < ahead; ++i) copy_weights(i, i);
      wait_for_previous_launch();
      for (int i = 0; i < ahead; ++i) copy_x(i, i);
      int slot = 0;
      uint32_t parity = 0;
      for (int i = ahead; i < steps; ++i) {
        wait_phase(&empty[slot], parity);
        copy_weights(slot, i);
        copy_x(slot, i);
        if (++slot == num_stages) slot = 0, parity ^= 1;
      }
    }
    __syncwarp();
    if (sends_sums) {
      cluster_wait();
      leave_cluster();
    } else if (ranks > 1) {
      meet_cluster();
      meet_cluster();
    }
    return;
  }

  const Decoder<T, kBits> decode(params.zero);
  const int codes_at = C::kXBytes + warp * C::kTileBytes + lane * 16;
  const int pair_at = warp * params.tile_groups * kGroupScaleBytes + lane / 4 * 4;
  const int second_group = (params.tile_groups - 1) * kGroupScaleBytes;
  float acc[kTokens / 2] = {};
  float sum[C::kScalesLevels ? 1 : kTokens / 2] = {};
  float2 scale = make_float2(0.0f, 0.0f);
  uint32_t a[2][2][4];
  // The sum of the group before, once its products have ended.
  const auto add_sum = [&] {
    wait_products<0>();
    if constexpr (C::kScalesLevels) {
      pin(acc);
    } else {
      pin(sum);
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[i] += sum[i] * (i % 4 < 2 ? scale.x : scale.y);
    }
  };
  int slot = 0;
  int last_slot = 0;
  uint32_t parity = 0;
  for (int step = 0; step < steps; ++step) {
    wait_phase(&full[slot], parity);
    const uint8_t* stage = shared + slot * C::kStageBytes;
    const uint8_t* pairs = shared + scales_at + slot * C::kScaleBytes + pair_at;
    const auto load_scale = [&](int half) {
      return Pair<__nv_bfloat16>::unpack(load<uint32_t>(pairs + half * second_group));
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto codes = decode.load(stage + codes_at, half);
      const uint32_t x = operand(base + slot * C::kStageBytes + half * (C::kXBytes / 2), 0);
      // All products of the stage before have ended.
      const auto release = [&] {
        if (half == 0 && step > 0 && lane == 0) arrive(&empty[last_slot]);
      };
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        if constexpr (C::kScalesLevels) {
          wait_products<1>();  // those that read a[block]
          decode(codes, block, a[block]);
          if (block == 0) scale = load_scale(half);
          const uint32_t factors[2] = {Pair<T>::pack(scale.x, scale.x),
                                       Pair<T>::pack(scale.y, scale.y)};
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            uint32_t& pair = a[block][i / 4][i % 4];
            pair = multiply_pairs<T>(pair, factors[i % 2]);
          }
          if (block == 1) release();
          begin_products();
          product<T>(acc, a[block][0], x + block * 4, true);
          product<T>(acc, a[block][1], x + block * 4 + 2, true);
          end_products();
        } else {
          if (block == 1) wait_products<1>();
          decode(codes, block, a[block]);
          if (block == 0) {
            add_sum();
            scale = load_scale(half);
            release();
          }
          begin_products();
          product<T>(sum, a[block][0], x + block * 4, block > 0);
          product<T>(sum, a[block][1], x + block * 4 + 2, true);
          end_products();
        }
      }
    }
    last_slot = slot;
    if (++slot == num_stages) slot = 0, parity ^= 1;
  }
  add_sum();

  T* const out = static_cast<T*>(params.out);
  const int row = (first_tile + warp) * kTileRows;
  const auto sum_of_tile = [&](int tile) {
    return make_float4(acc[4 * tile], acc[4 * tile + 1], acc[4 * tile + 2], acc[4 * tile + 3]);
  };
  if (ranks == 1) {
#pragma unroll
    for (int tile = 0; tile < C::kTokenTiles; ++tile) {
      store_fragment<T>(out, sum_of_tile(tile), Decoder<T, kBits>::kScale, tile * 8,
                        params.num_tokens, row, params.out_features, lane);
    }
    return;
  }
  // The ring becomes room for sums once all warps are through with it.
  constexpr int kRingRead = 1;
  sync_named(kRingRead, C::kConsumers);
  if (!sends_sums) {
    float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      sums[token * C::kSumStride + warp * kTileRows + lane / 4 + i % 4 / 2 * 8] = acc[i];
    }
    meet_cluster();
    // Each rank adds up and stores its share.
    constexpr int kRun = 4;
    constexpr int kRuns = C::kRows / kRun;
    for (int i = rank * C::kConsumers + static_cast<int>(threadIdx.x);
         i < params.num_tokens * kRuns; i += ranks * C::kConsumers) {
      const int token = i / kRuns;
      const int row = i % kRuns * kRun;
      const float4* own = reinterpret_cast<const float4*>(sums + token * C::kSumStride + row);
      float v[kRun] = {};
#pragma unroll 4
      for (int other = 0; other < ranks; ++other) {
        const float4 part = *in_block(own, other);
        v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
      }
#pragma unroll
      for (float& number : v) number *= Decoder<T, kBits>::kScale;
      const int n = first_tile * kTileRows + row;
      T* to = out + int64_t{token} * params.out_features + n;
      if (params.out_features % kRun == 0 && n < params.out_features) {
        *reinterpret_cast<uint2*>(to) =
            make_uint2(Pair<T>::pack(v[0], v[1]), Pair<T>::pack(v[2], v[3]));
      } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          if (n + k < params.out_features) to[k] = static_cast<T>(v[k]);
        }
      }
    }
    meet_cluster();
    return;
  }
  // Of each rank's sums those of 8 tokens go to one rank, to the same warp and lane there.
  if (threadIdx.x == 0) {
    const int tiles = (C::kTokenTiles - rank + ranks - 1) / ranks;
    arrive_expecting(&received, tiles * (ranks - 1) * C::kFragmentBytes);
  }
#pragma unroll
  for (int tile = 0; tile < C::kTokenTiles; ++tile) {
    reinterpret_cast<float4*>(shared + tile * C::kFragmentBytes)[threadIdx.x] = sum_of_tile(tile);
  }
  publish_writes();
  sync_named(kRingRead, C::kConsumers);
  cluster_wait();  // every block of the cluster runs
  // What rank `from` sends to the one that stores the tile.
  const auto sum_from = [&](int tile, int owner, int from) {
    const int place = tile / ranks * (ranks - 1) + from - (from > owner ? 1 : 0);
    return shared + params.sums_at + place * C::kFragmentBytes;
  };
  const int to_rank = warp % ranks;
  if (warp < C::kTokenTiles && to_rank != rank && lane == 0) {
    copy_to_block(address_in_block(sum_from(warp, to_rank, rank), to_rank),
                  shared + warp * C::kFragmentBytes, C::kFragmentBytes,
                  address_in_block(&received, to_rank));
  }
  __syncwarp();
  wait_phase(&received, 0);
  cluster_arrive();  // who sent may leave
  // This runs once: unrolled, its instructions would take longer to come than to run.
#pragma unroll 1
  for (int tile = rank; tile < C::kTokenTiles; tile += ranks) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int from = 0; from < ranks; ++from) {
      const uint8_t* part =
          from == rank ? shared + tile * C::kFragmentBytes : sum_from(tile, rank, from);
      add(sum, reinterpret_cast<const float4*>(part)[threadIdx.x]);
    }
    store_fragment<T>(out, sum, Decoder<T, kBits>::kScale, tile * 8, params.num_tokens, row,
                      params.out_features, lane);
  }
  cluster_wait();
#endif
}

template <typename T, int kBits, int kTokens>
HopperLinear describe_sm90() {
  constexpr int kGroups = 2;
  using C = HopperShape<T, kBits, kTokens, kGroups>;
  const auto kernel = low_bit_linear_sm90_kernel<T, kBits, kTokens, kGroups>;
  static const bool is_built = holds_kernel(kernel);
  return {kernel,         is_built,       kTokens,      C::kTiles,        C::kThreads,
          C::kStageBytes, C::kScaleBytes, C::kSumBytes, C::kFragmentBytes};
}

template <typename T, int kBits>
HopperLinear sm90_kernel_for(int num_tokens) {
  return num_tokens <= 32 ? describe_sm90<T, kBits, 32>() : describe_sm90<T, kBits, 64>();
}

template <int kBits>
HopperLinear sm90_kernel_for(int32_t dtype, int num_tokens) {
  return dtype == kFloat16 ? sm90_kernel_for<__half, kBits>(num_tokens)
                           : sm90_kernel_for<__nv_bfloat16, kBits>(num_tokens);
}

}  // namespace
}  // namespace cuda
}  // namespace minicpm41
