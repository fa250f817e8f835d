// out = x W^T for 2 to 16 tokens on Hopper where the shares of the rows are even: each
// multiprocessor has one block of a launch, alone or in a cluster of two that splits the columns.
//
// As in low_bit_linear_few_tokens.cuh a warp brings 64 columns of x into registers and takes tiles
// of rows apart against it, and sums meet twice in fixed order. 16 tokens are the rows of
// mma.m16n8k16's operand A and rows of W the columns of B: one product with constants serves all
// tiles for both halves of the tokens. 8 tokens are the columns of B.
//
// Where a block takes less than half of a multiprocessor the blocks of the next launch settle one
// beside each of this launch and fill their rings with codes meanwhile: after the wait for the
// launch before there remain x and the products.
#pragma once

#include "low_bit_linear_few_tokens.cuh"

namespace minicpm41 {
namespace cuda {

struct EvenSharesParams {
  CUtensorMap codes;   // [row_tiles, 8 bytes of codes], boxes of the kernel's tiles by a run
  CUtensorMap scales;  // [row_tiles, groups * 8 pairs], boxes of the groups of a stage
  CUtensorMap x;  // [in_features / 64, num_tokens, 64], boxes of a stage by the kernel's tokens
  void* out;
  int32_t num_tokens;
  int32_t out_features;
  int32_t k_tiles;
  int32_t tile_groups;  // groups of kTileColumns columns that have scales of their own
  int32_t group_shift;  // columns to groups
  int32_t zero;
  int32_t num_stages;
  int32_t sums_at;  // of the warps; 0: where the ring has been
};

// What a launch of one of the kernels below needs to know about it.
struct EvenSharesLinear {
  void (*kernel)(EvenSharesParams);
  bool is_built;  // false: compiled for other devices only
  int max_tokens;
  int tiles;    // of kTileRows rows a block works on
  int k_warps;  // tiles of kTileColumns columns a stage holds
  int threads;
  int stage_bytes;
  int run_bytes;  // of a row of tiles that a box of codes holds
  int sum_bytes;  // for the sums of the warps
  int fragments;  // of 512 bytes: what a block adds up
};

// How a block's warps share its work.
enum class EvenSharesArrangement {
  kFourTiles,  // of rows at most; two blocks of this and of the next find room
  kFiveTiles,
  kManyTiles,  // sixteen
};

// The kernel for `num_tokens`, instantiated in w2_linear.cu and w4_linear.cu.
EvenSharesLinear w2_linear_even_shares(int32_t dtype, int num_tokens, EvenSharesArrangement how);
EvenSharesLinear w4_linear_even_shares(int32_t dtype, int num_tokens, EvenSharesArrangement how);

constexpr int kFragmentBytes = kWarpSize * 16;

namespace {

// kRowWarps x kKWarps warps, each with kRowTiles tiles of rows by one tile of columns of a stage.
template <int kBits, int kTokenTiles, int kRowWarps, int kKWarps, int kRowTiles>
struct EvenSharesShape {
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kWarps = kRowWarps * kKWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlocks = kWarps == 8 ? 2 : 1;  // that share a multiprocessor
  static constexpr int kTiles = kRowWarps * kRowTiles;
  static constexpr int kTileBytes = kTileRows * kTileColumns / 8 * kBits;
  static constexpr int kRunBytes =
      kKWarps * kTileBytes < kBoxBytes ? kKWarps * kTileBytes : kBoxBytes;
  static constexpr int kBoxTiles = kRunBytes / kTileBytes;  // tiles of columns a box holds
  static constexpr int kXTileBytes = kTokens * kXRowBytes;
  static constexpr int kXBytes = kKWarps * kXTileBytes;
  static constexpr int kCodeBytes = kTiles * kKWarps * kTileBytes;
  static constexpr int kScaleBytes = kTiles * kKWarps * kMaxGroupsPerTile * kGroupScaleBytes;
  static constexpr int kStageBytes = kXBytes + kCodeBytes + kScaleBytes;
  static constexpr int kFragments = kRowTiles * kTokenTiles;
  static constexpr int kOwn = (kFragments + kKWarps - 1) / kKWarps;  // a warp adds up, at most
  static constexpr int kWarpSumBytes = kRowWarps * kFragments * (kKWarps - 1) * kFragmentBytes;
  static_assert(kKWarps % kBoxTiles == 0 && (kKWarps & (kKWarps - 1)) == 0, "see above");
};

#ifdef MINICPM41_HAS_WGMMA

// Codes as operands, in bfloat16 a constant of their column too large.
template <typename T, int kBits>
struct SharesDecoder : OperandDecoder<T, kBits> {
  using OperandDecoder<T, kBits>::OperandDecoder;
  static constexpr bool kIsShifted = Shifted<T, kBits>::kIsShifted;
};
template <>
struct SharesDecoder<__nv_bfloat16, 2> {
  static constexpr bool kIsShifted = true;
  uint32_t negative[3];
  __device__ __forceinline__ explicit SharesDecoder(int zero) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const float value = -static_cast<float>((128 >> (2 * i)) + zero);
      negative[i] = Pair<__nv_bfloat16>::pack(value, value);
    }
  }
  // Less than nothing by as much as pair `i` of 64 columns is too large.
  __device__ __forceinline__ uint32_t constant(int i) const { return negative[i % 3]; }
  // Three codes of each half word stand in the mantissa at once, a third fourth by shifting.
  __device__ __forceinline__ void operator()(const uint2& codes, int block,
                                             uint32_t (&a)[2][4]) const {
    const uint32_t words[2] = {codes.x, codes.y};
#pragma unroll
    for (int row_half = 0; row_half < 2; ++row_half) {
      const uint32_t word = words[row_half];
      const uint32_t shifted[3] = {word << 1, word >> 5, word >> 11};
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int i = 4 * block + pair, place = i % 3;
        // 128, 32 or 8, in whose mantissa the code counts twice its level.
        a[pair / 2][pair % 2 * 2 + row_half] =
            mask_or(shifted[i / 3], 0x00060006u << (2 * place), 0x43004300u - 0x01000100u * place);
      }
    }
  }
};

#endif  // MINICPM41_HAS_WGMMA

template <typename T, int kBits, int kTokenTiles, int kRowWarps, int kKWarps, int kRowTiles>
__global__ void __launch_bounds__(
    EvenSharesShape<kBits, kTokenTiles, kRowWarps, kKWarps, kRowTiles>::kThreads,
    EvenSharesShape<kBits, kTokenTiles, kRowWarps, kKWarps, kRowTiles>::kBlocks)
    low_bit_linear_even_shares_kernel(const __grid_constant__ EvenSharesParams params) {
#ifdef MINICPM41_HAS_WGMMA
  using C = EvenSharesShape<kBits, kTokenTiles, kRowWarps, kKWarps, kRowTiles>;
  constexpr bool kIsTurned = kTokenTiles == 2;  // tokens are rows of operand A
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages], x_full[kMaxStages], received;
  extern __shared__ __align__(128) uint8_t dynamic[];
  uint8_t* const shared = dynamic + (-shared_address(dynamic) & (kSwizzleBytes - 1));
  const uint32_t base = shared_address(shared);
  const int num_stages = params.num_stages;
  const int codes_at = num_stages * C::kXBytes;
  const int scales_at = codes_at + num_stages * C::kCodeBytes;
  const int rank_sums_at = scales_at + num_stages * C::kScaleBytes;

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int ranks = cluster_size();
  const int rank = cluster_rank();
  const int first_k = params.k_tiles * rank / ranks;
  const int own_k = params.k_tiles * (rank + 1) / ranks - first_k;
  const int steps = (own_k + kKWarps - 1) / kKWarps;
  // Even shares: no cluster has more than one tile of rows more than another.
  const int row_tiles = (params.out_features + kTileRows - 1) / kTileRows;
  const int cluster = blockIdx.x / ranks, clusters = gridDim.x / ranks;
  const int first_tile = static_cast<int>(int64_t{row_tiles} * cluster / clusters);
  const int last_tile = static_cast<int>(int64_t{row_tiles} * (cluster + 1) / clusters);
  const bool is_row_scale = params.group_shift > 7;
  const int scale_run = (is_row_scale ? 1 : kKWarps * params.tile_groups) * kGroupScaleBytes;

  const auto copy_weights = [&](int slot, int step) {
    const int k_tile = first_k + step * kKWarps;
    arrive_expecting(&full[slot], C::kCodeBytes + C::kTiles * scale_run);
#pragma unroll
    for (int k = 0; k < kKWarps; k += C::kBoxTiles) {
      copy_box(&params.codes,
               base + codes_at + slot * C::kCodeBytes + k * C::kTiles * C::kTileBytes, &full[slot],
               (k_tile + k) * (C::kTileBytes / 8), first_tile);
    }
    copy_box(&params.scales, base + scales_at + slot * C::kScaleBytes, &full[slot],
             ((k_tile * kTileColumns) >> params.group_shift) * kTileRows / 2, first_tile);
  };
  // Whole boxes: what lies beyond the last column is zero, beyond a rank's last one not used.
  const auto copy_x = [&](int slot, int step) {
    arrive_expecting(&x_full[slot], C::kXBytes);
    copy_box(&params.x, base + slot * C::kXBytes, &x_full[slot], 0, 0,
             2 * (first_k + step * kKWarps));
  };
  const int ahead = min(steps, num_stages);
  if (threadIdx.x == 0) {
    prefetch_map(&params.codes);
    prefetch_map(&params.scales);
    prefetch_map(&params.x);
    for (int slot = 0; slot < num_stages; ++slot) {
      init_barrier(&full[slot], 1);
      init_barrier(&x_full[slot], 1);
      init_barrier(&empty[slot], C::kWarps);
    }
    init_barrier(&received, 1);
    publish_barriers();
    // No earlier launch writes weights: as many as there is room for come before its end.
    for (int i = 0; i < ahead; ++i) copy_weights(i, i);
  }
  allow_next_launch();
  __syncthreads();
  if (ranks > 1) cluster_arrive();
  if (threadIdx.x == 0) {
    wait_for_previous_launch();
    for (int i = 0; i < ahead; ++i) copy_x(i, i);
  }
  __syncwarp();
  // The warps take turns at filling the slot of the step before, once all have left it. A warp that
  // does nothing else would cost all of them registers, which are given out by fours of warps.
  const auto refill = [&](int step, int slot, uint32_t parity) {
    const int next = step - 1 + num_stages;
    if (step > 0 && next < steps && warp == step % C::kWarps && lane == 0) {
      const int last = slot == 0 ? num_stages - 1 : slot - 1;
      wait_phase(&empty[last], slot == 0 ? parity ^ 1 : parity);
      copy_weights(last, next);
      copy_x(last, next);
    }
    __syncwarp();
  };

  const int row_warp = warp / kKWarps;
  const int k_warp = warp % kKWarps;
  const SharesDecoder<T, kBits> decode(params.zero);
  const uint32_t second_group = once((params.tile_groups - 1) * kGroupScaleBytes);
  // Where this lane reads in a stage. Lanes of eight bring the rows of one 8x8 matrix of x.
  const uint32_t own_codes =
      once(base + codes_at + k_warp / C::kBoxTiles * (C::kTiles * C::kRunBytes) +
           row_warp * kRowTiles * C::kRunBytes + k_warp % C::kBoxTiles * C::kTileBytes + lane * 16);
  const uint32_t own_pairs =
      once(base + scales_at + row_warp * kRowTiles * scale_run +
           (is_row_scale ? 0 : k_warp * params.tile_groups) * kGroupScaleBytes +
           (kIsTurned ? lane % 4 * 8 : lane / 4 * 4));
  const uint32_t own_x =
      once(base + k_warp * C::kXTileBytes +
           (kIsTurned ? lane % 16 * kTileColumns + (lane / 16 ^ lane % 8) * kChunkBytes
                      : lane % 8 * kTileColumns + (lane / 8 ^ lane % 8) * kChunkBytes));
  // Of a tile by 16 tokens there are two fragments: its upper and its lower rows.
  float acc[kRowTiles][kTokenTiles][4] = {};
  int slot = 0;
  uint32_t parity = 0;
  for (int step = 0; step < steps; ++step) {
    wait_phase(&full[slot], parity);
    wait_phase(&x_full[slot], parity);
    if (step * kKWarps + k_warp < own_k) {
      // Not unrolled: both halves at once take more registers than there are.
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const uint32_t x_at = own_x + slot * C::kXBytes + half * (C::kXTileBytes / 2);
        uint32_t x[2 * kTokenTiles][4];
#pragma unroll
        for (int i = 0; i < 2 * kTokenTiles; ++i) {
          load_matrices(x[i], x_at ^ i * (kIsTurned ? 2 : 4) * kChunkBytes);
        }
        float first[4];  // what sums begin with: the same for all rows
        {
          float sum[2][4] = {};
          if constexpr (SharesDecoder<T, kBits>::kIsShifted) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const uint32_t even = decode.constant(2 * i), odd = decode.constant(2 * i + 1);
              if constexpr (kIsTurned) {
                mma_16x8x16<T>(sum[i % 2], x[i], even, odd);
              } else {
                const uint32_t a[4] = {even, even, odd, odd};
                mma_16x8x16<T>(sum[i % 2], a, x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
              }
            }
          }
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int same = kIsTurned ? n & 2 : n & 1;
            first[n] = sum[0][same] + sum[1][same];
          }
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const auto codes =
              load_codes<kBits>(own_codes + slot * C::kCodeBytes + r * C::kRunBytes, half);
          const uint32_t pairs_at =
              own_pairs + slot * C::kScaleBytes + r * scale_run + half * second_group;
          float sum[kTokenTiles][4];
#pragma unroll
          for (int part = 0; part < kTokenTiles; ++part) {
#pragma unroll
            for (int n = 0; n < 4; ++n) sum[part][n] = first[n];
          }
          // A pair of scales is of two rows 8 apart. Turned, a lane has columns of two rows.
          uint32_t pairs[2];
          if constexpr (kIsTurned) {
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                         : "=r"(pairs[0]), "=r"(pairs[1])
                         : "r"(pairs_at));
          } else {
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pairs[0]) : "r"(pairs_at));
          }
#pragma unroll
          for (int block = 0; block < 2; ++block) {
            uint32_t a[2][4];
            decode(codes, block, a);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              if constexpr (kIsTurned) {
                mma_16x8x16<T>(sum[0], x[2 * block + i], a[i][0], a[i][2]);
                mma_16x8x16<T>(sum[1], x[2 * block + i], a[i][1], a[i][3]);
              } else {
                mma_16x8x16<T>(sum[0], a[i], x[block][i * 2], x[block][i * 2 + 1]);
              }
            }
          }
          const float2 scale = Pair<__nv_bfloat16>::unpack(pairs[0]);
          if constexpr (kIsTurned) {
            const float2 next = Pair<__nv_bfloat16>::unpack(pairs[1]);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              acc[r][0][n] += sum[0][n] * (n % 2 ? next.x : scale.x);
              acc[r][1][n] += sum[1][n] * (n % 2 ? next.y : scale.y);
            }
          } else {
#pragma unroll
            for (int n = 0; n < 4; ++n) acc[r][0][n] += sum[0][n] * (n < 2 ? scale.x : scale.y);
          }
          if (half == 0 && r == 1) refill(step, slot, parity);
        }
      }
    }
    __syncwarp();
    if (lane == 0) arrive(&empty[slot]);
    if (++slot == num_stages) slot = 0, parity ^= 1;
  }

  // Fragment i of a warp's rows is k_warp i % kKWarps's to add up; of all fragments of the block
  // every ranks-th is a rank's to store.
  constexpr int kSumsReady = 1;
  if (params.sums_at == 0) sync_named(kSumsReady, C::kThreads);  // no warp reads the ring any more
  float4 own[C::kOwn];
  float4* const warp_sums = reinterpret_cast<float4*>(shared + params.sums_at) +
                            row_warp * (C::kFragments * (kKWarps - 1) * kWarpSize) + lane;
#pragma unroll
  for (int i = 0; i < C::kFragments; ++i) {
    const float (&sum)[4] = acc[i / kTokenTiles][i % kTokenTiles];
    const float4 part = make_float4(sum[0], sum[1], sum[2], sum[3]);
    const int from = (k_warp - i) & (kKWarps - 1);
    if (from == 0) {
      own[i / kKWarps] = part;
    } else {
      warp_sums[(i * (kKWarps - 1) + from - 1) * kWarpSize] = part;
    }
  }
  if (ranks > 1 && threadIdx.x == 0) {
    const int fragments = (kRowWarps * C::kFragments - rank + ranks - 1) / ranks;
    arrive_expecting(&received, fragments * (ranks - 1) * kFragmentBytes);
  }
  sync_named(kSumsReady, C::kThreads);
  if (ranks > 1) cluster_wait();  // every block of the cluster runs
  // What rank `from` sends to the owner of a fragment.
  const auto sum_of = [&](int fragment, int owner, int from) {
    const int place = fragment / ranks * (ranks - 1) + from - (from > owner ? 1 : 0);
    return shared + rank_sums_at + place * kFragmentBytes;
  };
#pragma unroll
  for (int n = 0; n < C::kOwn; ++n) {
    const int i = n * kKWarps + k_warp;
    if (i >= C::kFragments) break;
    float4* const parts = warp_sums + i * (kKWarps - 1) * kWarpSize;
#pragma unroll
    for (int from = 0; from < kKWarps - 1; ++from) add(own[n], parts[from * kWarpSize]);
    const int fragment = row_warp * C::kFragments + i, owner = fragment % ranks;
    if (owner != rank) {
      *parts = own[n];  // in place of the first, which has been added
      publish_writes();
      __syncwarp();
      if (lane == 0) {
        copy_to_block(address_in_block(sum_of(fragment, owner, rank), owner), parts, kFragmentBytes,
                      address_in_block(&received, owner));
      }
      __syncwarp();
    }
  }
  if (ranks > 1) wait_phase(&received, 0);
#pragma unroll
  for (int n = 0; n < C::kOwn; ++n) {
    const int i = n * kKWarps + k_warp;
    const int fragment = row_warp * C::kFragments + i;
    const int tile = first_tile + row_warp * kRowTiles + i / kTokenTiles;
    if (i >= C::kFragments || fragment % ranks != rank || tile >= last_tile) continue;
    float4 sum = own[n];
    if (ranks > 1) {
      sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int from = 0; from < ranks; ++from) {
        const uint8_t* const part = sum_of(fragment, rank, from);
        add(sum, from == rank ? own[n] : reinterpret_cast<const float4*>(part)[lane]);
      }
    }
    T* const out = static_cast<T*>(params.out);
    constexpr float kScale = Decoder<T, kBits>::kScale;
    if constexpr (kIsTurned) {
      const int row = tile * kTileRows + i % 2 * 8 + lane % 4 * 2;
      store_pair<T>(out, Pair<T>::pack(sum.x * kScale, sum.y * kScale), lane / 4, row,
                    params.num_tokens, params.out_features);
      store_pair<T>(out, Pair<T>::pack(sum.z * kScale, sum.w * kScale), lane / 4 + 8, row,
                    params.num_tokens, params.out_features);
    } else {
      store_fragment<T>(out, sum, kScale, 0, params.num_tokens, tile * kTileRows,
                        params.out_features, lane);
    }
  }
  if (ranks > 1) leave_cluster();  // what this block sent has arrived
#endif
}

template <typename T, int kBits, int kTokenTiles, int kRowWarps, int kKWarps, int kRowTiles>
EvenSharesLinear describe_even_shares() {
  using C = EvenSharesShape<kBits, kTokenTiles, kRowWarps, kKWarps, kRowTiles>;
  const auto kernel =
      low_bit_linear_even_shares_kernel<T, kBits, kTokenTiles, kRowWarps, kKWarps, kRowTiles>;
  static const bool is_built = holds_kernel(kernel);
  return {kernel,      is_built,       C::kTokens,   C::kTiles,        kKWarps,
          C::kThreads, C::kStageBytes, C::kRunBytes, C::kWarpSumBytes, kRowWarps * C::kFragments};
}

template <typename T, int kBits, int kTokenTiles>
EvenSharesLinear even_shares_kernel_for(EvenSharesArrangement how) {
  switch (how) {
    case EvenSharesArrangement::kFourTiles:
      return describe_even_shares<T, kBits, kTokenTiles, 1, 8, 4>();
    case EvenSharesArrangement::kFiveTiles:
      return describe_even_shares<T, kBits, kTokenTiles, 1, 8, 5>();
    default:
      return describe_even_shares<T, kBits, kTokenTiles, 4, 4, 4>();
  }
}

template <typename T, int kBits>
EvenSharesLinear even_shares_kernel_for(int num_tokens, EvenSharesArrangement how) {
  return num_tokens <= 8 ? even_shares_kernel_for<T, kBits, 1>(how)
                         : even_shares_kernel_for<T, kBits, 2>(how);
}

template <int kBits>
EvenSharesLinear even_shares_kernel_for(int32_t dtype, int num_tokens, EvenSharesArrangement how) {
  return dtype == kFloat16 ? even_shares_kernel_for<__half, kBits>(num_tokens, how)
                           : even_shares_kernel_for<__nv_bfloat16, kBits>(num_tokens, how);
}

}  // namespace
}  // namespace cuda
}  // namespace minicpm41
