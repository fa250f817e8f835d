// out = x W^T for one token on Hopper: products of 8-bit integers, exact, since codes cost least
// where they need not become floating-point levels.
//
// A mask leaves four codes of a word in place, one a byte, as operand A of mma.m16n8k32: a code in
// higher places of its byte counts 4 or 16 times as much, which x makes good. x becomes integers of
// 23 bits, a power of two a group of 64 columns, and these three digits of 8 bits, which take three
// of the eight columns of operand B; the digits of the group beside it take three more, with 0
// where the codes are not theirs, so that one accumulator sums two groups. The sums leave the
// product as fp32: the accumulator starts from bits that, read as a float, have a last place of 1,
// less what the zero point adds, which is the sum of x over the group.
//
// Every launch has one block a multiprocessor and every multiprocessor room for two blocks: the
// blocks of the next launch settle one beside each of this launch and fill their rings meanwhile.
// Where codes come from memory all the time they settle once this launch has emptied a stage.
// After the wait for the launch before there remain x, its digits and the products.
#pragma once

#include "low_bit_linear_sm90.cuh"

namespace minicpm41 {
namespace cuda {

struct OneTokenParams {
  const uint8_t* qweight;
  const uint16_t* scales;
  const void* x;
  void* out;
  int32_t out_features;
  int32_t k_tiles;
  int32_t groups;
  int32_t tile_groups;  // groups of kTileColumns columns that have scales of their own
  int32_t group_shift;  // columns to groups
  int32_t zero;
  int32_t num_stages;
  int32_t next_launch_at;  // lets the next launch begin with this stage; 0: at once
  int32_t x_parts;  // of kPartTiles tiles of columns a warp: that are kept as digits at a time
};

// What a launch of one of the kernels below needs to know about it.
struct OneTokenLinear {
  void (*kernel)(OneTokenParams);
  bool is_built;  // false: compiled for other devices only
  int row_tiles;  // of a stage
  int threads;
  int stage_bytes;  // codes and scales
  int part_tiles;   // of columns that are split at a time
  int part_bytes;   // as digits
};

// Instantiated in w2_linear.cu and w4_linear.cu; `share`: tiles of rows that a block takes at most.
OneTokenLinear w2_linear_one_token(int32_t dtype, int share);
OneTokenLinear w4_linear_one_token(int32_t dtype, int share);

namespace {

constexpr int kDigits = 3;
constexpr int kXGroup = 64;                   // columns that share a power of two
constexpr int kXGroupBytes = 192;             // kDigits rows of 64 bytes
constexpr int kFactorsAt = 2 * kXGroupBytes;  // of a tile of columns
constexpr int kFactorBytes = 16;
constexpr int kXTileBytes = 432;  // a warp's four tiles fall into different banks
constexpr int kPartTiles = 4;     // of columns a warp splits at a time

// A stage: kRowTiles tiles of rows by kWarpTiles tiles of columns a warp. Products of two tiles are
// independent and hide each other's latency; codes of 4 bits want smaller stages.
template <int kBits, int kRowTiles>
struct OneTokenShape {
  static constexpr int kKWarps = 8;
  static constexpr int kWarpTiles = kBits == 2 && kRowTiles == 2 ? 2 : 1;
  static constexpr int kConsumers = kKWarps * kWarpSize;
  static constexpr int kThreads = kConsumers + kWarpSize;
  static constexpr int kRows = kRowTiles * kTileRows;
  static constexpr int kTileBytes = kTileRows * kTileColumns / 8 * kBits;
  static constexpr int kColumnTiles = kWarpTiles * kKWarps;
  static constexpr int kRunBytes = kColumnTiles * kTileBytes;
  static constexpr int kScaleRunBytes = kColumnTiles * kMaxGroupsPerTile * kGroupScaleBytes;
  static constexpr int kStageBytes = kRowTiles * (kRunBytes + kScaleRunBytes);
};
// How many places to the left of a byte's last the codes of a word of operand B's order stand.
template <int kBits>
__host__ __device__ constexpr int places(int word) {
  return kBits == 2 ? 2 * word : word % 2 * 4;
}

#ifdef MINICPM41_HAS_WGMMA

constexpr uint32_t kWholeBits = 0x4b400000u;  // 1.5 * 2^23: a last place of 1
constexpr float kWhole = 12582912.0f;

// d += A B, A of unsigned, B of signed bytes.
__device__ __forceinline__ void mma_16x8x32(uint32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Keeps the compiler from working an address out anew wherever it is used.
__device__ __forceinline__ void pin(uint32_t& address) { asm volatile("" : "+r"(address)); }
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// A lane's codes of a tile; those of 64 columns as operand A of two products.
template <int kBits>
struct Bytes;
template <>
struct Bytes<2> {
  uint4 words;
  __device__ __forceinline__ void load(uint32_t tile) { words = load_chunk_in_order(tile); }
  __device__ __forceinline__ void take(int half, uint32_t (&a)[2][4]) const {
    const uint32_t low = half == 0 ? words.x : words.z;
    const uint32_t high = half == 0 ? words.y : words.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t mask = 0x03030303u << (2 * i);
      a[i / 2][i % 2 * 2] = low & mask;
      a[i / 2][i % 2 * 2 + 1] = high & mask;
    }
  }
};
template <>
struct Bytes<4> {
  uint4 words[2];
  __device__ __forceinline__ void load(uint32_t tile) {
    words[0] = load_chunk_in_order(tile);
    words[1] = load_chunk_in_order(tile + kWarpSize * 16);
  }
  __device__ __forceinline__ void take(int half, uint32_t (&a)[2][4]) const {
    const uint4 chunk = words[half];
    const uint32_t pairs[2][2] = {{chunk.x, chunk.y}, {chunk.z, chunk.w}};
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[block][i] = pairs[block][i % 2] & (i < 2 ? 0x0f0f0f0fu : 0xf0f0f0f0u);
      }
    }
  }
};

// The larger of each of two pairs of 16-bit integers. Bits of floating-point numbers without signs
// order as these do, NaN above all.
__device__ __forceinline__ uint32_t larger_pairs(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.u16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// Word `word` of each lane's operand B holds two runs of 8 columns of a group by turns.
struct Runs {
  uint4 chunks[2];
};
template <int kBits>
__device__ __forceinline__ int run_start(int word) {
  return kBits == 2 ? 8 * word : 32 * (word / 2) + 8 * (word % 2);
}
template <int kBits>
constexpr int kRunsApart = kBits == 2 ? 32 : 16;

// Makes digits of these; four neighbouring lanes do a group. `factors`: where the sums of the first
// and of the last digit start, and what a unit of the last one counts.
template <typename T, int kBits>
__device__ __forceinline__ void split_x(const Runs& x, int word, int zero, bool stores,
                                        uint8_t* digits, uint8_t* factors) {
  constexpr uint32_t kNoSigns = 0x7fff7fffu;
  const uint32_t words[2][4] = {{x.chunks[0].x, x.chunks[0].y, x.chunks[0].z, x.chunks[0].w},
                                {x.chunks[1].x, x.chunks[1].y, x.chunks[1].z, x.chunks[1].w}};
  uint32_t pair = 0;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    pair = larger_pairs(pair, larger_pairs(words[0][t] & kNoSigns, words[1][t] & kNoSigns));
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    pair = larger_pairs(pair, __shfl_xor_sync(kAllLanes, pair, step));
  }
  const float largest = Pair<T>::unpack(larger_pairs(pair, pair >> 16)).x;
  // The largest becomes less than 2^22: numbers of less than 2^-103 count as such.
  const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23), 24);
  const float scale =
      __uint_as_float(static_cast<uint32_t>(275 - exponent - places<kBits>(word)) << 23);
  int sum = 0;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    uint32_t d[4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float2 v = Pair<T>::unpack(words[s][t]);
      // A sum whose last place is 1 ends with the rounded product.
      d[s] = __float_as_uint(fmaf(v.x, scale, kWhole)) - kWholeBits + 0x808080u;
      d[2 + s] = __float_as_uint(fmaf(v.y, scale, kWhole)) - kWholeBits + 0x808080u;
    }
    // With 128 more in each digit the signed ones can be cut out as bytes.
    sum += static_cast<int>(d[0] + d[1] + d[2] + d[3]);
    const uint32_t low01 = __byte_perm(d[0], d[1], 0x5140), low23 = __byte_perm(d[2], d[3], 0x5140);
    const uint32_t high01 = __byte_perm(d[0], d[1], 0x0062),
                   high23 = __byte_perm(d[2], d[3], 0x0062);
    const uint32_t by_digit[kDigits] = {__byte_perm(high01, high23, 0x5410) ^ 0x80808080u,
                                        __byte_perm(low01, low23, 0x7632) ^ 0x80808080u,
                                        __byte_perm(low01, low23, 0x5410) ^ 0x80808080u};
    if (stores) {
#pragma unroll
      for (int n = 0; n < kDigits; ++n) {
        *reinterpret_cast<uint32_t*>(digits + n * kXGroup + t * 16 + word * 4) = by_digit[n];
      }
    }
  }
  sum = (sum - 16 * 0x808080) << places<kBits>(word);
#pragma unroll
  for (int step = 1; step < 4; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  // What the zero point adds, in halves: the part that counts for the first digit, and the rest.
  const int first = zero * (sum >> 16);
  const int rest = zero * (sum & 0xffff) + (first & 1) * 0x10000;
  // NaN where some x is not finite.
  const uint32_t unit = exponent == 255 ? 0x7fc00000u : static_cast<uint32_t>(exponent - 21) << 23;
  if (stores && word == 0) {
    *reinterpret_cast<uint4*>(factors) =
        make_uint4(kWholeBits - (first >> 1), kWholeBits - (rest >> 1), unit, 0);
  }
}

#endif  // MINICPM41_HAS_WGMMA

template <typename T, int kBits, int kRowTiles>
__global__ void __launch_bounds__(OneTokenShape<kBits, kRowTiles>::kThreads, 2)
    low_bit_linear_one_token_kernel(const OneTokenParams params) {
#ifdef MINICPM41_HAS_WGMMA
  using C = OneTokenShape<kBits, kRowTiles>;
  constexpr int kKWarps = C::kKWarps, kColumnTiles = C::kColumnTiles;
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  __shared__ uint4 no_digits;
  __shared__ float sums[2][C::kRows][kKWarps + 1];
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int num_stages = params.num_stages;
  const int k_tiles = params.k_tiles;
  uint8_t* const digits = shared + num_stages * C::kStageBytes;

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  // Even shares: no block has more than one tile of rows more than another.
  const int row_tiles = (params.out_features + kTileRows - 1) / kTileRows;
  const int first_tile = static_cast<int>(int64_t{row_tiles} * blockIdx.x / gridDim.x);
  const int last_tile = static_cast<int>(int64_t{row_tiles} * (blockIdx.x + 1) / gridDim.x);

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < num_stages; ++slot) {
      init_barrier(&full[slot], 1);
      init_barrier(&empty[slot], kKWarps);
    }
    no_digits = make_uint4(0, 0, 0, 0);
    publish_barriers();
  }
  if (params.next_launch_at == 0) allow_next_launch();
  __syncthreads();

  if (warp == kKWarps) {
    // No earlier launch writes weights: they need not wait for its end.
    int slot = 0, stages = 0;
    uint32_t parity = 1;  // the phase before the first has ended
    for (int tile = first_tile; tile < last_tile; tile += kRowTiles) {
      const int tiles = min(kRowTiles, last_tile - tile);
      for (int k_tile = 0; k_tile < k_tiles; k_tile += kColumnTiles) {
        wait_phase(shared_address(&empty[slot]), parity);
        if (++stages == params.next_launch_at) allow_next_launch();
        const int count = min(kColumnTiles, k_tiles - k_tile);
        const int first_group = (k_tile * kTileColumns) >> params.group_shift;
        const int group_bytes =
            (params.group_shift > 7 ? 1 : count * params.tile_groups) * kGroupScaleBytes;
        const uint32_t barrier = shared_address(&full[slot]);
        const uint32_t stage = base + slot * C::kStageBytes;
        expect_bytes(barrier, tiles * (count * C::kTileBytes + group_bytes), lane);
        copy_runs(barrier, stage, C::kRunBytes,
                  params.qweight + (int64_t{tile} * k_tiles + k_tile) * C::kTileBytes,
                  int64_t{k_tiles} * C::kTileBytes, count * C::kTileBytes, tiles, lane);
        copy_runs(barrier, stage + kRowTiles * C::kRunBytes, C::kScaleRunBytes,
                  params.scales + (int64_t{tile} * params.groups + first_group) * kTileRows,
                  int64_t{params.groups} * kGroupScaleBytes, group_bytes, tiles, lane);
        if (++slot == num_stages) slot = 0, parity ^= 1;
      }
    }
    return;
  }

  // Each warp splits the columns that it will multiply, a tile by eight lanes.
  const int word = lane % 4, half = lane / 4 % 2, part_tile = lane / 8;
  const T* const x = static_cast<const T*>(params.x) + half * kXGroup + run_start<kBits>(word);
  const auto load_runs = [&](int first_k) {
    // Beyond the last tile that one is loaded once more, for nothing.
    const T* at = x + min(first_k + part_tile * kKWarps + warp, k_tiles - 1) * kTileColumns;
    return Runs{{*reinterpret_cast<const uint4*>(at),
                 *reinterpret_cast<const uint4*>(at + kRunsApart<kBits>)}};
  };
  wait_for_previous_launch();
  Runs runs = load_runs(0);

  const int own_group = params.group_shift > 7 ? 0 : warp * params.tile_groups;
  // Columns 0 to 2 of operand B are the digits of a tile's first group, 4 to 6 of its second, and 3
  // and 7 repeat what is before them: what these yield is not used. Of the results a lane has two
  // columns, so one group.
  const int column = lane / 4;
  const int group_of_b = column / 4, group_of_sums = lane % 4 / 2;
  const bool has_last = lane % 2 == 1;  // digit, or else the first two
  uint32_t own_codes = base + warp * C::kTileBytes + lane * 16;
  uint32_t own_scales = base + kRowTiles * C::kRunBytes + lane / 4 * 4 +
                        (own_group + group_of_sums * (params.tile_groups - 1)) * kGroupScaleBytes;
  // A warp's tiles of a part lie side by side.
  const uint32_t own_x = shared_address(digits) + warp * kPartTiles * kXTileBytes;
  uint32_t own_digits =
      own_x + group_of_b * kXGroupBytes + min(column % 4, kDigits - 1) * kXGroup + lane % 4 * 16;
  uint32_t own_factors = own_x + kFactorsAt + group_of_sums * kFactorBytes;
  const uint32_t nothing = shared_address(&no_digits);
  uint32_t first_full = shared_address(full), first_empty = shared_address(empty);
  pin(own_codes), pin(own_scales), pin(own_digits), pin(own_factors);
  pin(first_full), pin(first_empty);
  const int second_scales =
      params.group_shift > 7 ? 0 : kKWarps * params.tile_groups * kGroupScaleBytes;
  constexpr int kSumsReady = 1;
  int slot = 0, turn = 0;
  uint32_t parity = 0;
  for (int tile = first_tile; tile < last_tile; tile += kRowTiles) {
    const int tiles = min(kRowTiles, last_tile - tile);
    float acc[kRowTiles][4] = {};
    int part = 0, of_part = 0;
    for (int first_k = 0; first_k < k_tiles; first_k += kColumnTiles) {
      const int part_at = part * kKWarps * kPartTiles * kXTileBytes;
      if (tile == first_tile && of_part == 0) {
        uint8_t* const target = digits + part_at + (warp * kPartTiles + part_tile) * kXTileBytes;
        split_x<T, kBits>(runs, word, params.zero, first_k + part_tile * kKWarps + warp < k_tiles,
                          target + half * kXGroupBytes, target + kFactorsAt + half * kFactorBytes);
        const int next = first_k + kPartTiles * kKWarps;
        if (next < k_tiles) runs = load_runs(next);
        __syncwarp();
      }
      wait_phase(first_full + slot * 8, parity);
      if (first_k + warp < k_tiles) {
        // Where there are fewer tiles the rest is whatever lies there; it is not used.
        const bool has_both = first_k + kKWarps + warp < k_tiles;
        const int stage = slot * C::kStageBytes, x_at = part_at + of_part * kXTileBytes;
        uint4 b[2][C::kWarpTiles];  // by groups
        float units[C::kWarpTiles];
        Bytes<kBits> codes[C::kWarpTiles][kRowTiles];
        uint32_t d[C::kWarpTiles][kRowTiles][4], scales[C::kWarpTiles][kRowTiles];
#pragma unroll
        for (int i = 0; i < C::kWarpTiles; ++i) {
          const uint32_t digits_at = own_digits + x_at + i * kXTileBytes;
          b[0][i] = load_chunk_in_order(group_of_b == 0 ? digits_at : nothing);
          b[1][i] = load_chunk_in_order(group_of_b == 1 ? digits_at : nothing);
          const uint4 factor = load_chunk_in_order(own_factors + x_at + i * kXTileBytes);
          units[i] = __uint_as_float(factor.z);
          const uint32_t start = has_last ? factor.y : factor.x;
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            codes[i][r].load(own_codes + stage + r * C::kRunBytes + i * kKWarps * C::kTileBytes);
            scales[i][r] =
                load_word(own_scales + stage + r * C::kScaleRunBytes + i * second_scales);
#pragma unroll
            for (int n = 0; n < 4; ++n) d[i][r][n] = n % 2 == 0 ? start : kWholeBits;
          }
        }
#pragma unroll
        for (int group = 0; group < 2; ++group) {
#pragma unroll
          for (int word_pair = 0; word_pair < 2; ++word_pair) {
#pragma unroll
            for (int i = 0; i < C::kWarpTiles; ++i) {
              const uint4 own = b[group][i];
#pragma unroll
              for (int r = 0; r < kRowTiles; ++r) {
                uint32_t a[2][4];
                codes[i][r].take(group, a);
                mma_16x8x32(d[i][r], a[word_pair], word_pair == 0 ? own.x : own.z,
                            word_pair == 0 ? own.y : own.w);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < C::kWarpTiles; ++i) {
          if (i == 0 || has_both) {
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) {
              const float2 scale = Pair<__nv_bfloat16>::unpack(scales[i][r]);
              const float by_row[2] = {scale.x * units[i], scale.y * units[i]};
#pragma unroll
              for (int n = 0; n < 4; ++n) {
                acc[r][n] = fmaf(__uint_as_float(d[i][r][n]) - kWhole, by_row[n / 2], acc[r][n]);
              }
            }
          }
        }
      }
      of_part += C::kWarpTiles;
      if (of_part == kPartTiles) {
        of_part = 0;
        if (++part == params.x_parts) part = 0;
      }
      __syncwarp();
      if (lane == 0) arrive(first_empty + slot * 8);
      if (++slot == num_stages) slot = 0, parity ^= 1;
    }
    // What a unit of the lane's digits counts.
    const float first = has_last ? 1.0f : 65536.0f, next = has_last ? 0.0f : 256.0f;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const float upper = fmaf(acc[r][0], first, acc[r][1] * next);
      const float lower = fmaf(acc[r][2], first, acc[r][3] * next);
      // Even lanes add up row lane / 4, odd ones the row eight below.
      float sum = has_last ? lower : upper;
      sum += __shfl_xor_sync(kAllLanes, has_last ? upper : lower, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (lane % 4 < 2) sums[turn][r * kTileRows + lane % 2 * 8 + lane / 4][warp] = sum;
    }
    // Two sets of sums in turn: who is a block ahead waits here for those who still read.
    sync_named(kSumsReady, C::kConsumers);
    const int row = threadIdx.x;
    const int n = tile * kTileRows + row;
    if (row < tiles * kTileRows && n < params.out_features) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kKWarps; ++k) sum += sums[turn][row][k];
      static_cast<T*>(params.out)[n] = static_cast<T>(sum);
    }
    turn ^= 1;
  }
#endif
}

template <typename T, int kBits, int kRowTiles>
OneTokenLinear describe_one_token() {
  using C = OneTokenShape<kBits, kRowTiles>;
  const auto kernel = low_bit_linear_one_token_kernel<T, kBits, kRowTiles>;
  static const bool is_built = holds_kernel(kernel);
  constexpr int kTiles = kPartTiles * C::kKWarps;
  return {kernel, is_built, kRowTiles, C::kThreads, C::kStageBytes, kTiles, kTiles * kXTileBytes};
}

// Three tiles in one round cost less than two and then one.
template <typename T, int kBits>
OneTokenLinear one_token_kernel_for(int share) {
  return share == 3 ? describe_one_token<T, kBits, 3>() : describe_one_token<T, kBits, 2>();
}

template <int kBits>
OneTokenLinear one_token_kernel_for(int32_t dtype, int share) {
  return dtype == kFloat16 ? one_token_kernel_for<__half, kBits>(share)
                           : one_token_kernel_for<__nv_bfloat16, kBits>(share);
}

}  // namespace
}  // namespace cuda
}  // namespace minicpm41
