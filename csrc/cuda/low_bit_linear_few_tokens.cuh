// out = x W^T for 2 to 16 tokens on Hopper where rows are few: a cluster of blocks works on 64 rows
// and splits the columns, and the copy engine brings x beside the codes, straight from where the
// launch before left it.
//
// A warp brings 64 columns of x into registers as operand B and takes four tiles of rows apart
// against it. In bfloat16 a shift and a mask make a code an operand: in the mantissa of a power of
// two it is that power too much. What the powers of a group add up to is one product of x with
// constants; with its negative the sums begin. Sums meet twice: those of a block's warps in its
// shared memory, those of the ranks in the memory of the rank that stores them, each time in fixed
// order: the result is deterministic.
#pragma once

#include "low_bit_linear_sm90.cuh"

namespace minicpm41 {
namespace cuda {

struct FewTokensParams {
  CUtensorMap codes;   // [row_tiles, 8 bytes of codes], boxes of the kernel's tiles by kBoxBytes
  CUtensorMap scales;  // [row_tiles, groups * 8 pairs], boxes of the groups of a stage
  CUtensorMap x;       // [in_features / 64, num_tokens, 64], boxes of 2 by the kernel's tokens
  void* out;
  int32_t num_tokens;
  int32_t out_features;
  int32_t k_tiles;
  int32_t tile_groups;  // groups of kTileColumns columns that have scales of their own
  int32_t group_shift;  // columns to groups
  int32_t zero;
  int32_t num_stages;
};

// What a launch of one of the kernels below needs to know about it.
struct FewTokensLinear {
  void (*kernel)(FewTokensParams);
  bool is_built;  // false: compiled for other devices only
  int max_tokens;
  int tiles;    // of kTileRows rows a block works on
  int k_warps;  // tiles of kTileColumns columns a stage holds
  int threads;
  int stage_bytes;
  int sum_bytes;  // for the sums of warps and ranks
};

// The kernel for `num_tokens`, instantiated in w2_linear.cu and w4_linear.cu.
FewTokensLinear w2_linear_few_tokens(int32_t dtype, int num_tokens);
FewTokensLinear w4_linear_few_tokens(int32_t dtype, int num_tokens);

constexpr int kBoxBytes = 2048;  // 256 numbers of 8 bytes, the most that a box is wide
constexpr int kMostFewTokensRanks = 2;

namespace {

// Each of kKWarps warps takes kRowTiles tiles of rows by one tile of columns of a stage.
template <int kBits, int kTokenTiles>
struct FewTokensShape {
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kRowTiles = 4, kKWarps = 8;
  static constexpr int kConsumers = kKWarps * kWarpSize;
  static constexpr int kThreads = kConsumers + kWarpSize;
  static constexpr int kTileBytes = kTileRows * kTileColumns / 8 * kBits;
  static constexpr int kBoxTiles = kBoxBytes / kTileBytes;  // tiles of columns a box holds
  static constexpr int kXTileBytes = kTokens * kXRowBytes;
  static constexpr int kXBytes = kKWarps * kXTileBytes;
  static constexpr int kCodeBytes = kRowTiles * kKWarps * kTileBytes;
  static constexpr int kScaleBytes = kRowTiles * kKWarps * kMaxGroupsPerTile * kGroupScaleBytes;
  static constexpr int kStageBytes = kXBytes + kCodeBytes + kScaleBytes;
  static constexpr int kFragmentBytes = kWarpSize * 16;
  static constexpr int kFragments = kRowTiles * kTokenTiles;  // one a warp to add up, at most
  static constexpr int kWarpSumBytes = kFragments * (kKWarps - 1) * kFragmentBytes;
  static constexpr int kRankSumBytes = kFragments * (kMostFewTokensRanks - 1) * kFragmentBytes;
  static_assert(kFragments <= kKWarps && kKWarps % kBoxTiles == 0, "see above");
};

#ifdef MINICPM41_HAS_WGMMA

// Codes as operands that are a constant of their column too large.
template <typename T, int kBits>
struct Shifted {
  static constexpr bool kIsShifted = false;
};
template <>
struct Shifted<__nv_bfloat16, 2> {
  static constexpr bool kIsShifted = true;
  uint32_t negative[2];
  __device__ __forceinline__ explicit Shifted(int zero) {
    negative[0] = Pair<__nv_bfloat16>::pack(-32.0f - zero, -32.0f - zero);
    negative[1] = Pair<__nv_bfloat16>::pack(-8.0f - zero, -8.0f - zero);
  }
  // Less than nothing by as much as pair `i` of 64 columns is too large.
  __device__ __forceinline__ uint32_t constant(int i) const { return negative[i % 2]; }
  __device__ __forceinline__ void operator()(const uint2& codes, int block,
                                             uint32_t (&a)[2][4]) const {
    const uint32_t words[2] = {codes.x, codes.y};
#pragma unroll
    for (int row_half = 0; row_half < 2; ++row_half) {
      const uint32_t word = words[row_half];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int i = 4 * block + pair, shift = 3 - 4 * (i / 2);
        const uint32_t shifted = shift > 0 ? word << shift : word >> -shift;
        a[pair / 2][pair % 2 * 2 + row_half] = i % 2 ? mask_or(shifted, 0x00600060u, 0x41004100u)
                                                     : mask_or(shifted, 0x00180018u, 0x42004200u);
      }
    }
  }
};
template <>
struct Shifted<__nv_bfloat16, 4> {
  static constexpr bool kIsShifted = true;
  __device__ __forceinline__ explicit Shifted(int) {}
  __device__ __forceinline__ uint32_t constant(int) const { return 0xc1c0c1c0u; }  // -16 - 8
  __device__ __forceinline__ void operator()(const uint4& codes, int block,
                                             uint32_t (&a)[2][4]) const {
    const uint32_t words[2] = {block ? codes.z : codes.x, block ? codes.w : codes.y};
#pragma unroll
    for (int row_half = 0; row_half < 2; ++row_half) {
      const uint32_t word = words[row_half];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int shift = 3 - 4 * pair;
        const uint32_t shifted = shift > 0 ? word << shift : word >> -shift;
        a[pair / 2][pair % 2 * 2 + row_half] = mask_or(shifted, 0x00780078u, 0x41804180u);
      }
    }
  }
};
template <typename T, int kBits, bool kIsShifted = Shifted<T, kBits>::kIsShifted>
struct OperandDecoder : Decoder<T, kBits> {
  using Decoder<T, kBits>::Decoder;
};
template <typename T, int kBits>
struct OperandDecoder<T, kBits, true> : Shifted<T, kBits> {
  using Shifted<T, kBits>::Shifted;
};

// What Decoder::load returns, in one access: the compiler would split it.
template <int kBits>
__device__ __forceinline__ auto load_codes(uint32_t codes, int half) {
  if constexpr (kBits == 2) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(codes + half * 8));
    return v;
  } else {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(codes + half * kWarpSize * 16));
    return v;
  }
}

#endif  // MINICPM41_HAS_WGMMA

template <typename T, int kBits, int kTokenTiles>
__global__ void __launch_bounds__(FewTokensShape<kBits, kTokenTiles>::kThreads, 1)
    low_bit_linear_few_tokens_kernel(const __grid_constant__ FewTokensParams params) {
#ifdef MINICPM41_HAS_WGMMA
  using C = FewTokensShape<kBits, kTokenTiles>;
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages], x_full[kMaxStages], received;
  extern __shared__ __align__(128) uint8_t dynamic[];
  uint8_t* const shared = dynamic + (-shared_address(dynamic) & (kSwizzleBytes - 1));
  const uint32_t base = shared_address(shared);
  const int num_stages = params.num_stages;
  const int codes_at = num_stages * C::kXBytes;
  const int scales_at = codes_at + num_stages * C::kCodeBytes;
  const int warp_sums_at = scales_at + num_stages * C::kScaleBytes;
  const int rank_sums_at = warp_sums_at + C::kWarpSumBytes;

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int ranks = cluster_size();
  const int rank = cluster_rank();
  const int first_k = params.k_tiles * rank / ranks;
  const int own_k = params.k_tiles * (rank + 1) / ranks - first_k;
  const int steps = (own_k + C::kKWarps - 1) / C::kKWarps;
  const int first_tile = blockIdx.x / ranks * C::kRowTiles;
  const bool is_row_scale = params.group_shift > 7;
  const int scale_run = (is_row_scale ? 1 : C::kKWarps * params.tile_groups) * kGroupScaleBytes;

  const auto copy_weights = [&](int slot, int step) {
    const int k_tile = first_k + step * C::kKWarps;
    arrive_expecting(&full[slot], C::kCodeBytes + C::kRowTiles * scale_run);
#pragma unroll
    for (int k = 0; k < C::kKWarps; k += C::kBoxTiles) {
      copy_box(&params.codes,
               base + codes_at + slot * C::kCodeBytes + k * C::kRowTiles * C::kTileBytes,
               &full[slot], (k_tile + k) * (C::kTileBytes / 8), first_tile);
    }
    copy_box(&params.scales, base + scales_at + slot * C::kScaleBytes, &full[slot],
             ((k_tile * kTileColumns) >> params.group_shift) * kTileRows / 2, first_tile);
  };
  const int ahead = min(steps, num_stages);
  if (threadIdx.x == C::kConsumers) {
    prefetch_map(&params.codes);
    prefetch_map(&params.scales);
    prefetch_map(&params.x);
    for (int slot = 0; slot < num_stages; ++slot) {
      init_barrier(&full[slot], 1);
      init_barrier(&x_full[slot], 1);
      init_barrier(&empty[slot], C::kKWarps);
    }
    init_barrier(&received, 1);
    publish_barriers();
    // No earlier launch writes weights. But copies come in the order they are asked for: behind a
    // whole ring of codes the first x would come last.
    copy_weights(0, 0);
  }
  allow_next_launch();
  __syncthreads();
  if (ranks > 1) cluster_arrive();

  if (warp == C::kKWarps) {
    if (lane == 0) {
      const auto copy_x = [&](int slot, int step) {
        const int k_tile = step * C::kKWarps;
        const int count = min(C::kKWarps, own_k - k_tile);
        arrive_expecting(&x_full[slot], count * C::kXTileBytes);
        for (int k = 0; k < count; ++k) {
          copy_box(&params.x, base + slot * C::kXBytes + k * C::kXTileBytes, &x_full[slot], 0, 0,
                   2 * (first_k + k_tile + k));
        }
      };
      wait_for_previous_launch();
      for (int i = 0; i < ahead; ++i) {
        if (i > 0) copy_weights(i, i);
        copy_x(i, i);
      }
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
    if (ranks > 1) {
      cluster_wait();
      leave_cluster();
    }
    return;
  }

  const OperandDecoder<T, kBits> decode(params.zero);
  const uint32_t second_group = once((params.tile_groups - 1) * kGroupScaleBytes);
  // Where this lane reads in a stage. Lanes of eight bring the rows of one 8x8 matrix of x, the
  // four of them 32 columns.
  const uint32_t own_codes =
      once(base + codes_at + warp / C::kBoxTiles * (C::kRowTiles * kBoxBytes) +
           warp % C::kBoxTiles * C::kTileBytes + lane * 16);
  const uint32_t own_pairs =
      once(base + scales_at + (is_row_scale ? 0 : warp * params.tile_groups) * kGroupScaleBytes +
           lane / 4 * 4);
  const uint32_t own_x = once(base + warp * C::kXTileBytes + lane % 8 * kTileColumns +
                              (lane / 8 ^ lane % 8) * kChunkBytes);
  float acc[C::kRowTiles][kTokenTiles][4] = {};
  int slot = 0;
  uint32_t parity = 0;
  for (int step = 0; step < steps; ++step) {
    wait_phase(&full[slot], parity);
    wait_phase(&x_full[slot], parity);
    if (step * C::kKWarps + warp < own_k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t x = own_x + slot * C::kXBytes + half * (C::kXTileBytes / 2);
        uint32_t b[kTokenTiles][2][4];
        float first[kTokenTiles][2];  // what sums of two neighbouring tokens begin with
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          load_matrices(b[tile][0], x + tile * 8 * kTileColumns);
          load_matrices(b[tile][1], (x ^ 4 * kChunkBytes) + tile * 8 * kTileColumns);
        }
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          float sum[2][4] = {};
          if constexpr (Shifted<T, kBits>::kIsShifted) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const uint32_t even = decode.constant(2 * i), odd = decode.constant(2 * i + 1);
              const uint32_t a[4] = {even, even, odd, odd};
              mma_16x8x16<T>(sum[i % 2], a, b[tile][i / 2][i % 2 * 2],
                             b[tile][i / 2][i % 2 * 2 + 1]);
            }
          }
          first[tile][0] = sum[0][0] + sum[1][0];
          first[tile][1] = sum[0][1] + sum[1][1];
        }
#pragma unroll
        for (int r = 0; r < C::kRowTiles; ++r) {
          const auto codes =
              load_codes<kBits>(own_codes + slot * C::kCodeBytes + r * kBoxBytes, half);
          uint32_t pair;
          asm volatile(
              "ld.shared.u32 %0, [%1];"
              : "=r"(pair)
              : "r"(own_pairs + slot * C::kScaleBytes + r * scale_run + half * second_group));
          const float2 scale = Pair<__nv_bfloat16>::unpack(pair);
          float sum[kTokenTiles][4];
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
            for (int n = 0; n < 4; ++n) sum[tile][n] = first[tile][n % 2];
          }
#pragma unroll
          for (int block = 0; block < 2; ++block) {
            uint32_t a[2][4];
            decode(codes, block, a);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
              for (int tile = 0; tile < kTokenTiles; ++tile) {
                mma_16x8x16<T>(sum[tile], a[i], b[tile][block][i * 2], b[tile][block][i * 2 + 1]);
              }
            }
          }
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              acc[r][tile][n] += sum[tile][n] * (n < 2 ? scale.x : scale.y);
            }
          }
        }
      }
    }
    __syncwarp();
    if (lane == 0) arrive(&empty[slot]);
    if (++slot == num_stages) slot = 0, parity ^= 1;
  }

  // Fragment i is warp i's to add up, and rank i % ranks's to store.
  float4 own = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float4* const warp_sums = reinterpret_cast<float4*>(shared + warp_sums_at) + lane;
#pragma unroll
  for (int i = 0; i < C::kFragments; ++i) {
    const float (&sum)[4] = acc[i / kTokenTiles][i % kTokenTiles];
    const float4 part = make_float4(sum[0], sum[1], sum[2], sum[3]);
    const int from = (warp - i) & (C::kKWarps - 1);
    if (from == 0) {
      own = part;
    } else {
      warp_sums[(i * (C::kKWarps - 1) + from - 1) * kWarpSize] = part;
    }
  }
  if (ranks > 1 && threadIdx.x == 0) {
    const int fragments = (C::kFragments - rank + ranks - 1) / ranks;
    arrive_expecting(&received, fragments * (ranks - 1) * C::kFragmentBytes);
  }
  constexpr int kSumsReady = 1;
  sync_named(kSumsReady, C::kConsumers);
  if (ranks > 1) cluster_wait();  // every block of the cluster runs
  if (warp >= C::kFragments) {
    if (ranks > 1) leave_cluster();
    return;
  }
  float4* const parts = warp_sums + warp * (C::kKWarps - 1) * kWarpSize;
#pragma unroll
  for (int from = 0; from < C::kKWarps - 1; ++from) add(own, parts[from * kWarpSize]);
  float4 sum = own;
  if (ranks > 1) {
    const int owner = warp % ranks;
    // What rank `from` sends to the owner.
    const auto sum_of = [&](int from) {
      const int place = warp / ranks * (ranks - 1) + from - (from > owner ? 1 : 0);
      return shared + rank_sums_at + place * C::kFragmentBytes;
    };
    if (owner != rank) {
      *parts = own;  // in place of the first, which has been added
      publish_writes();
      __syncwarp();
      if (lane == 0) {
        copy_to_block(address_in_block(sum_of(rank), owner), parts, C::kFragmentBytes,
                      address_in_block(&received, owner));
      }
      __syncwarp();
      leave_cluster();
      return;
    }
    wait_phase(&received, 0);
    cluster_arrive();  // who sent may leave
    sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int from = 0; from < ranks; ++from) {
      add(sum, from == rank ? own : reinterpret_cast<const float4*>(sum_of(from))[lane]);
    }
  }
  store_fragment<T>(static_cast<T*>(params.out), sum, Decoder<T, kBits>::kScale,
                    warp % kTokenTiles * 8, params.num_tokens,
                    (first_tile + warp / kTokenTiles) * kTileRows, params.out_features, lane);
  if (ranks > 1) cluster_wait();
#endif
}

template <typename T, int kBits, int kTokenTiles>
FewTokensLinear describe_few_tokens() {
  using C = FewTokensShape<kBits, kTokenTiles>;
  const auto kernel = low_bit_linear_few_tokens_kernel<T, kBits, kTokenTiles>;
  static const bool is_built = holds_kernel(kernel);
  return {kernel,     is_built,    C::kTokens,     C::kRowTiles,
          C::kKWarps, C::kThreads, C::kStageBytes, C::kWarpSumBytes + C::kRankSumBytes};
}

template <typename T, int kBits>
FewTokensLinear few_tokens_kernel_for(int num_tokens) {
  return num_tokens <= 8 ? describe_few_tokens<T, kBits, 1>() : describe_few_tokens<T, kBits, 2>();
}

template <int kBits>
FewTokensLinear few_tokens_kernel_for(int32_t dtype, int num_tokens) {
  return dtype == kFloat16 ? few_tokens_kernel_for<__half, kBits>(num_tokens)
                           : few_tokens_kernel_for<__nv_bfloat16, kBits>(num_tokens);
}

}  // namespace
}  // namespace cuda
}  // namespace minicpm41
