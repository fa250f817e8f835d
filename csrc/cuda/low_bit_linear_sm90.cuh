// out = x W^T for 17 to 64 tokens on Hopper: 64 rows of W a warpgroup as operand A of wgmma, taken
// from registers, where their codes have just become levels; tokens are operand B, read by all
// warpgroups from where the copy engine put them.
//
// One thread copies codes and scales, another x, a stage of 128 columns or two at a time, by tensor
// maps: x in the order that wgmma reads, straight from where the launch before left it. What a map
// does not hold (rows, columns or tokens beyond the last) arrives as 0. Codes of 32 columns are
// taken apart while the products of the 32 before them run. Blocks of a cluster split the columns.
// Where there is memory beside the ring each sends its sums to the rank that stores them, else they
// read each other's in place of the ring. They add up in the order of their ranks: the result is
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
  CUtensorMap x;       // [in_features / 64, num_tokens, 64], boxes of 2 by all tokens
  void* out;
  int32_t num_tokens;
  int32_t out_features;
  int32_t x_tile_bytes;  // of the tokens that a box has
  int32_t code_words;    // numbers of a tile in the map of codes
  int32_t tile_groups;   // groups of kTileColumns columns that have scales of their own
  int32_t group_shift;   // columns to groups
  int32_t zero;
  int32_t num_stages;
  int32_t sums_at;       // in shared memory, for the sums that ranks send each other; 0: none does
  int32_t rank_steps;    // stages a rank takes at least
  int32_t longer_ranks;  // the first ones, which take one more
};

// What a launch of one of the kernels below needs to know about it.
struct HopperLinear {
  void (*kernel)(HopperLinearParams);
  bool is_built;  // false: compiled for other devices only
  int max_tokens;
  int tiles;    // tiles of kTileRows rows a block works on
  int k_tiles;  // of kTileColumns columns a stage holds
  int threads;
  int stage_bytes;     // of the ring, without scales
  int scale_bytes;     // of a stage
  int sum_bytes;       // at the end, in place of the ring; 0: blocks always send their sums
  int fragment_bytes;  // sums of 8 tokens
};

// The kernel for `num_tokens`, instantiated in w2_linear.cu, w4_linear.cu and w8_linear.cu, with
// blocks of 128 rows or, `narrow`, of 64 rows whose warpgroups take columns by turns; these are
// not built for all numbers of tokens.
HopperLinear w2_linear_sm90(int32_t dtype, int num_tokens, bool narrow);
HopperLinear w4_linear_sm90(int32_t dtype, int num_tokens, bool narrow);
HopperLinear w8_linear_sm90(int32_t dtype, int num_tokens, bool narrow);

constexpr int kMaxHopperStages = 24;
constexpr int kSwizzleBytes = 1024;  // what the copy engine swizzles starts on multiples of it

namespace {

#ifdef MINICPM41_HAS_WGMMA

__device__ __forceinline__ int cluster_index() {
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return static_cast<int>(index);
}
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

// As wait_phase by a pointer, by an address.
__device__ __forceinline__ void wait_full(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\nbra again;\nfinished:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Loads that stay behind the wait before them, as ordinary ones do not.
__device__ __forceinline__ uint32_t load_in_order(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_pair_in_order(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_chunk_in_order(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
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

// Stores a token's numbers of rows `row` and `row` + 1, as far as there are such.
template <typename T>
__device__ __forceinline__ void store_pair(T* out, uint32_t pair, int token, int row,
                                           int num_tokens, int out_features) {
  if (token >= num_tokens || row >= out_features) return;
  T* const to = out + int64_t{token} * out_features + row;
  if (out_features % 2 == 0) {
    *reinterpret_cast<uint32_t*>(to) = pair;
  } else {
    const T* numbers = reinterpret_cast<const T*>(&pair);
    to[0] = numbers[0];
    if (row + 1 < out_features) to[1] = numbers[1];
  }
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
    store_pair<T>(out, pair, token + lane / 4, row + half * 8 + lane % 4 * 2, num_tokens,
                  out_features);
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

#ifdef MINICPM41_HAS_WGMMA
// A power of two, twice in bfloat16.
__device__ constexpr uint32_t power_pair(int exponent) {
  return static_cast<uint32_t>(exponent + 127) << 7 | static_cast<uint32_t>(exponent + 127) << 23;
}

// Codes of 32 columns to levels in bfloat16 for two products, each multiplied by its scale, rounded
// once and smaller by 2^kDown.
//
// The eight lowest bits of a bfloat16 count 2^-133 evenly: seven are the places of its subnormal
// numbers, the eighth makes the first normal ones. So codes are numbers where they stand, once
// masked. A zero that is a power of two times a scale is exact: one multiplication and addition
// takes it off and rounds. With two bits it is 1.5, and levels come first, exact.
template <int kBits>
struct ScaledLevels {
  using T = __nv_bfloat16;
  using Codes = std::conditional_t<kBits == 8, uint4, uint2>;
  static constexpr int kUnit = 133;
  // As far as scales may go up: to 2^27. With two bits only levels need it.
  static constexpr int kDown = kBits == 2 ? 7 : 32;
  static constexpr float kScale = static_cast<float>(uint64_t{1} << kDown);
  static constexpr int kPlaces = kBits == 4 ? 2 : 1;  // of a byte, by factors of their own
  uint32_t factors[2][kPlaces];                       // of the two rows that a lane has
  uint32_t terms[2];

  __device__ __forceinline__ explicit ScaledLevels(int zero) {
    if constexpr (kBits == 2) {
      const float term = static_cast<float>(-zero) / (2.0f * kScale);
      terms[0] = terms[1] = Pair<T>::pack(term, term);
    }
  }
  // The scales of both rows.
  __device__ __forceinline__ void set_scales(uint32_t pair) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t scale = __byte_perm(pair, pair, row == 0 ? 0x1010 : 0x3232);
      if constexpr (kBits == 2) {
        factors[row][0] = scale;
      } else {
#pragma unroll
        for (int place = 0; place < kPlaces; ++place) {
          factors[row][place] = multiply_pairs<T>(scale, power_pair(kUnit - kDown - 4 * place));
        }
        constexpr uint32_t kSigns = 0x80008000u;
        terms[row] = multiply_pairs<T>(scale, power_pair(kBits - 1 - kDown) | kSigns);
      }
    }
  }
  static __device__ __forceinline__ Codes load(uint32_t tile, int half, int block) {
    if constexpr (kBits == 2) {
      return load_pair_in_order(tile + half * 8);
    } else if constexpr (kBits == 4) {
      return load_pair_in_order(tile + half * kWarpSize * 16 + block * 8);
    } else {
      return load_chunk_in_order(tile + (2 * half + block) * kWarpSize * 16);
    }
  }
  __device__ __forceinline__ void operator()(const Codes& codes, int block,
                                             uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = i / 4, pair = i % 4;
      uint32_t& level = a[pair / 2][pair % 2 * 2 + row];
      if constexpr (kBits == 2) {
        const uint32_t code = (row == 0 ? codes.x : codes.y) >> (8 * block) & 0x00030003u
                                                                                  << (2 * pair);
        level = Magic<T>::fma(code, power_pair(kUnit - kDown - 2 * pair), terms[row]);
        level = multiply_pairs<T>(level, factors[row][0]);
      } else if constexpr (kBits == 4) {
        const int place = pair % 2;
        const uint32_t code = (row == 0 ? codes.x : codes.y) >> (pair / 2 * 8) & 0x000f000fu
                                                                                     << (4 * place);
        level = Magic<T>::fma(code, factors[row][place], terms[row]);
      } else {
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        const uint32_t code =
            __byte_perm(words[2 * row + pair / 2], 0, pair % 2 == 0 ? 0x4140 : 0x4342);
        level = Magic<T>::fma(code, factors[row][0], terms[row]);
      }
    }
  }
};
#endif  // MINICPM41_HAS_WGMMA

// kTokens tokens, warpgroups of kRowGroups times 64 rows by kSets tiles of columns. kScalesLevels:
// levels are multiplied by their group's scale and rounded to T, as a framework rounds a weight,
// and one sum runs through all columns; else a group's exact levels are summed and the sum is
// multiplied.
template <typename T, int kBits, int kTokens, int kRowGroups, int kSets>
struct HopperShape {
  static constexpr bool kScalesLevels = std::is_same<T, __nv_bfloat16>::value;
  static constexpr int kConsumers = kRowGroups * kSets * kWarpGroup;
  static constexpr int kThreads = kConsumers + 2 * kWarpSize;
  // That share a multiprocessor. Sums of exact levels beside the running ones take their registers.
  static constexpr int kBlocks = kTokens == 64 && !kScalesLevels ? 1 : 2;
  static constexpr int kTiles = kRowGroups * kGroupTiles;
  static constexpr int kRows = kTiles * kTileRows;
  static constexpr int kTileBytes = kTileRows * kTileColumns / 8 * kBits;
  static constexpr int kXBytes = kTokens * kXRowBytes;
  static constexpr int kCodesAt = kSets * kXBytes;
  static constexpr int kStageBytes = kSets * (kXBytes + kTiles * kTileBytes);
  static constexpr int kScaleBytes = kTiles * kMaxGroupsPerTile * kGroupScaleBytes;  // of a set
  // Sums lie token by token, padded so that a warp's tokens fall into different banks.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kSumBytes = kTokens * kSumStride * 4;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kFragmentBytes = kConsumers * 16;  // sums of 8 tokens, of all sets
  static constexpr int kSetBytes = kFragmentBytes / kSets;
  static_assert(kStageBytes % kSwizzleBytes == 0, "x of each stage is swizzled");
  static_assert(kSets == 1 || kScalesLevels, "only one sum runs through all columns");
};

template <typename T, int kBits, int kTokens, int kRowGroups, int kSets>
__global__ void __launch_bounds__(HopperShape<T, kBits, kTokens, kRowGroups, kSets>::kThreads,
                                  HopperShape<T, kBits, kTokens, kRowGroups, kSets>::kBlocks)
    low_bit_linear_sm90_kernel(const __grid_constant__ HopperLinearParams params) {
#ifdef MINICPM41_HAS_WGMMA
  using C = HopperShape<T, kBits, kTokens, kRowGroups, kSets>;
  constexpr int kConsumerWarps = C::kConsumers / kWarpSize;
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
  const int first_step = rank * params.rank_steps + min(rank, params.longer_ranks);
  const int steps = params.rank_steps + (rank < params.longer_ranks ? 1 : 0);
  const int first_tile = cluster_index() * C::kTiles;
  const bool sends_sums = params.sums_at > 0;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < num_stages; ++slot) {
      init_barrier(&full[slot], 2);
      init_barrier(&empty[slot], kConsumerWarps);
    }
    init_barrier(&received, 1);
    publish_barriers();
  }
  allow_next_launch();
  __syncthreads();
  if (sends_sums) cluster_arrive();

  if (warp >= kConsumerWarps) {
    // No earlier launch writes weights: as many as there is room for come before its end.
    const bool copies_x = warp > kConsumerWarps;
    if (lane == 0) {
      const int scale_bytes = C::kTiles * params.tile_groups * kGroupScaleBytes;
      if (copies_x) {
        prefetch_map(&params.x);
        wait_for_previous_launch();
      }
      int slot = 0;
      uint32_t parity = 1;  // the phase before the first has ended
      for (int i = 0; i < steps; ++i) {
        wait_phase(&empty[slot], parity);
        const uint32_t stage = base + slot * C::kStageBytes;
        const int k_tile = (first_step + i) * kSets;
        arrive_expecting(&full[slot],
                         copies_x ? kSets * params.x_tile_bytes
                                  : C::kStageBytes - kSets * C::kXBytes + kSets * scale_bytes);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          if (copies_x) {
            copy_box(&params.x, stage + set * C::kXBytes, &full[slot], 0, 0, 2 * (k_tile + set));
          } else {
            copy_box(&params.codes, stage + C::kCodesAt + set * C::kTiles * C::kTileBytes,
                     &full[slot], (k_tile + set) * params.code_words, first_tile);
            copy_box(&params.scales, base + scales_at + (slot * kSets + set) * C::kScaleBytes,
                     &full[slot],
                     (((k_tile + set) * kTileColumns) >> params.group_shift) * kTileRows / 2,
                     first_tile);
          }
        }
        if (++slot == num_stages) slot = 0, parity ^= 1;
      }
    }
    __syncwarp();
    if (!sends_sums && ranks > 1) {
      meet_cluster();
      meet_cluster();
    }
    return;
  }

  // Taken from one lane, so that the compiler knows it to be the same in all: addresses of operand
  // B are then uniform registers from the start.
  const int set = kSets == 1 ? 0 : __shfl_sync(kAllLanes, warp / C::kTiles, 0);
  const int tile_of_warp = warp % C::kTiles;
  const int codes_at = C::kCodesAt + warp * C::kTileBytes + lane * 16;
  const int pair_at =
      set * C::kScaleBytes + lane / 4 * 4 + tile_of_warp * params.tile_groups * kGroupScaleBytes;
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
  if constexpr (C::kScalesLevels) {
    const uint32_t full_at = once(shared_address(full)), empty_at = once(shared_address(empty));
    const uint32_t codes_from = once(base + codes_at);
    const uint32_t pairs_from = once(base + scales_at + pair_at);
    const uint32_t x_from = once(operand(base + set * C::kXBytes, 0));
    const uint32_t x_half = params.x_tile_bytes >> 5;
    ScaledLevels<kBits> scaled_levels(params.zero);
    for (int step = 0; step < steps; ++step) {
      wait_full(full_at + slot * 8, parity);
      const uint32_t codes = codes_from + slot * C::kStageBytes;
      const uint32_t pairs = pairs_from + slot * kSets * C::kScaleBytes;
      const uint32_t x = x_from + slot * (C::kStageBytes >> 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const auto own = ScaledLevels<kBits>::load(codes, half, block);
          if (block == 0) scaled_levels.set_scales(load_in_order(pairs + half * second_group));
          wait_products<1>();  // those that read a[block]
          scaled_levels(own, block, a[block]);
          // All products of the stage before have ended.
          if (half == 0 && block == 1 && step > 0 && lane == 0) arrive(empty_at + last_slot * 8);
          begin_products();
          const uint32_t columns = x + half * x_half + block * 4;
          product<T>(acc, a[block][0], columns, true);
          product<T>(acc, a[block][1], columns + 2, true);
          end_products();
        }
      }
      last_slot = slot;
      if (++slot == num_stages) slot = 0, parity ^= 1;
    }
  } else {
    const Decoder<T, kBits> decode(params.zero);
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
        const uint32_t x =
            operand(base + slot * C::kStageBytes + half * (params.x_tile_bytes / 2), 0);
        // All products of the stage before have ended.
        const auto release = [&] {
          if (half == 0 && step > 0 && lane == 0) arrive(&empty[last_slot]);
        };
#pragma unroll
        for (int block = 0; block < 2; ++block) {
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
      last_slot = slot;
      if (++slot == num_stages) slot = 0, parity ^= 1;
    }
  }
  add_sum();

  using Levels = std::conditional_t<C::kScalesLevels, ScaledLevels<kBits>, Decoder<T, kBits>>;
  T* const out = static_cast<T*>(params.out);
  const int row = (first_tile + tile_of_warp) * kTileRows;
  const auto sum_of_tile = [&](int tile) {
    return make_float4(acc[4 * tile], acc[4 * tile + 1], acc[4 * tile + 2], acc[4 * tile + 3]);
  };
  if (!sends_sums && ranks == 1) {
#pragma unroll
    for (int tile = 0; tile < C::kTokenTiles; ++tile) {
      store_fragment<T>(out, sum_of_tile(tile), Levels::kScale, tile * 8, params.num_tokens, row,
                        params.out_features, lane);
    }
    return;
  }
  if (!sends_sums) {
    // The ring becomes room for sums once all warps are through with it.
    constexpr int kRingRead = 1;
    sync_named(kRingRead, C::kConsumers);
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
      for (float& number : v) number *= Levels::kScale;
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
  // Sums of 8 tokens go to one rank, to the same lane there. Nobody needs to stay for the others:
  // what a block receives it waits for.
  uint8_t* const own_sums = shared + params.sums_at + (tile_of_warp * kWarpSize + lane) * 16;
  if (threadIdx.x == 0) {
    const int own_tiles = (C::kTokenTiles - rank + ranks - 1) / ranks;
    arrive_expecting(&received, own_tiles * ranks * C::kFragmentBytes);
  }
  cluster_wait();  // every block of the cluster runs
  int owner = 0;
  uint8_t* place = own_sums + (rank * kSets + set) * C::kSetBytes;
#pragma unroll
  for (int tile = 0; tile < C::kTokenTiles; ++tile) {
    send(address_in_block(place, owner), address_in_block(&received, owner), sum_of_tile(tile));
    if (++owner == ranks) owner = 0, place += ranks * C::kFragmentBytes;
  }
  wait_phase(&received, 0);
  // This runs once: unrolled, its instructions would take longer to come than to run.
#pragma unroll 1
  for (int i = set; rank + i * ranks < C::kTokenTiles; i += kSets) {
    const uint8_t* part = own_sums + i * ranks * C::kFragmentBytes;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int from = 0; from < ranks * kSets; ++from, part += C::kSetBytes) {
      add(sum, load<float4>(part));
    }
    store_fragment<T>(out, sum, Levels::kScale, (rank + i * ranks) * 8, params.num_tokens, row,
                      params.out_features, lane);
  }
#endif
}

template <typename T, int kBits, int kTokens, int kRowGroups, int kSets>
HopperLinear describe_sm90() {
  using C = HopperShape<T, kBits, kTokens, kRowGroups, kSets>;
  const auto kernel = low_bit_linear_sm90_kernel<T, kBits, kTokens, kRowGroups, kSets>;
  static const bool is_built = holds_kernel(kernel);
  return {kernel,
          is_built,
          kTokens,
          C::kTiles,
          kSets,
          C::kThreads,
          C::kStageBytes,
          kSets * C::kScaleBytes,
          kSets == 1 ? C::kSumBytes : 0,
          C::kFragmentBytes};
}

template <typename T, int kBits>
HopperLinear sm90_kernel_for(int num_tokens, bool narrow) {
  if (narrow) {
    if constexpr (HopperShape<T, kBits, 64, 2, 1>::kScalesLevels) {
      if (num_tokens > 32) return describe_sm90<T, kBits, 64, 1, 2>();
    }
    return {};
  }
  return num_tokens <= 32 ? describe_sm90<T, kBits, 32, 2, 1>()
                          : describe_sm90<T, kBits, 64, 2, 1>();
}

template <int kBits>
HopperLinear sm90_kernel_for(int32_t dtype, int num_tokens, bool narrow) {
  return dtype == kFloat16 ? sm90_kernel_for<__half, kBits>(num_tokens, narrow)
                           : sm90_kernel_for<__nv_bfloat16, kBits>(num_tokens, narrow);
}

}  // namespace
}  // namespace cuda
}  // namespace minicpm41
