// out = x W^T for one token on Hopper: products of 8-bit integers, exact, since codes cost least
// where they need not become floating-point levels.
//
// A mask leaves four codes of a word in place, one a byte, as operand A of mma.m16n8k32: a code in
// higher places of its byte counts 4 or 16 times as much, which x makes good. x becomes integers of
// 23 bits, a power of two a group of 64 columns, and these three digits of 8 bits, which take three
// of the eight columns of operand B. A group's sums leave the product as fp32: the accumulator
// starts from bits that, read as a float, have a last place of 1. What the zero point adds is the
// sum of x over the group.
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
};

// What a launch of one of the kernels below needs to know about it.
struct OneTokenLinear {
  void (*kernel)(OneTokenParams);
  bool is_built;  // false: compiled for other devices only
  int row_tiles;  // a block works on at a time
  int threads;
  int stage_bytes;   // codes and scales
  int x_tile_bytes;  // for each tile of columns
};

// Instantiated in w2_linear.cu and w4_linear.cu.
OneTokenLinear w2_linear_one_token(int32_t dtype);
OneTokenLinear w4_linear_one_token(int32_t dtype);

namespace {

constexpr int kDigits = 3;
constexpr int kXGroup = 64;        // columns that share a power of two
constexpr int kXGroupBytes = 208;  // kDigits rows of 64 bytes, padded against bank conflicts
constexpr int kFactorBytes = 32;   // two float4
constexpr int kXTileBytes = kTileColumns / kXGroup * (kXGroupBytes + kFactorBytes);

// kRowTiles tiles of rows by kKWarps tiles of columns a stage, each a warp's.
template <int kBits, int kRowTiles, int kKWarps>
struct OneTokenShape {
  static constexpr int kWarps = kRowTiles * kKWarps;
  static constexpr int kConsumers = kWarps * kWarpSize;
  static constexpr int kThreads = kConsumers + kWarpSize;
  static constexpr int kRows = kRowTiles * kTileRows;
  static constexpr int kTileBytes = kTileRows * kTileColumns / 8 * kBits;
  static constexpr int kRunBytes = kKWarps * kTileBytes;
  static constexpr int kScaleRunBytes = kKWarps * kMaxGroupsPerTile * kGroupScaleBytes;
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

// d = A B + c, A of unsigned, B of signed bytes.
__device__ __forceinline__ void mma_16x8x32(uint32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1, const uint32_t (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
}

// A lane's codes of 64 columns as operand A of two products.
template <int kBits>
struct Bytes;
template <>
struct Bytes<2> {
  static __device__ __forceinline__ void load(const uint8_t* codes, int half, uint32_t (&a)[2][4]) {
    const uint2 words = cuda::load<uint2>(codes + half * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t mask = 0x03030303u << (2 * i);
      a[i / 2][i % 2 * 2] = words.x & mask;
      a[i / 2][i % 2 * 2 + 1] = words.y & mask;
    }
  }
};
template <>
struct Bytes<4> {
  static __device__ __forceinline__ void load(const uint8_t* codes, int half, uint32_t (&a)[2][4]) {
    const uint4 chunk = cuda::load<uint4>(codes + half * kWarpSize * 16);
    const uint32_t words[2][2] = {{chunk.x, chunk.y}, {chunk.z, chunk.w}};
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[block][i] = words[block][i % 2] & (i < 2 ? 0x0f0f0f0fu : 0xf0f0f0f0u);
      }
    }
  }
};
// 16 columns of a group of 64, those that word `word` of each lane's operand B holds, as digits;
// four neighbouring lanes do a group. `factors`: what a unit of digit 0, 1 (first float4) and 2
// counts, each with what the zero point adds.
template <typename T, int kBits>
__device__ __forceinline__ void split_x(const T* x, int word, float zero, uint8_t* digits,
                                        float4* factors) {
  // Two runs of 8 columns, by turns in a word's bytes.
  const int run = kBits == 2 ? 8 * word : 32 * (word / 2) + 8 * (word % 2);
  constexpr int kApart = kBits == 2 ? 32 : 16;
  float v[2][8];
  float largest = 0.0f;
  bool is_finite = true;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint4 chunk = *reinterpret_cast<const uint4*>(x + run + s * kApart);
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Pair<T>::unpack(words[i]);
      v[s][2 * i] = pair.x, v[s][2 * i + 1] = pair.y;
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
      // NaN would be lost in the maximum.
      is_finite = is_finite && fabsf(pair.x) <= 3.4e38f && fabsf(pair.y) <= 3.4e38f;
    }
  }
  if (!is_finite) largest = __uint_as_float(0x7f800000u);
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
  // The largest becomes less than 2^22: numbers of less than 2^-103 count as such.
  const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23), 24);
  const float scale =
      __uint_as_float(static_cast<uint32_t>(275 - exponent - places<kBits>(word)) << 23);
  int sums[kDigits] = {};
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    uint32_t d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t whole = __float2int_rn(v[i % 2][2 * t + i / 2] * scale);
      d[i] = (whole + 0x808080u) ^ 0x808080u;  // signed digits, the lowest first
    }
    const uint32_t low01 = __byte_perm(d[0], d[1], 0x5140), low23 = __byte_perm(d[2], d[3], 0x5140);
    const uint32_t high01 = __byte_perm(d[0], d[1], 0x0062),
                   high23 = __byte_perm(d[2], d[3], 0x0062);
    const uint32_t by_digit[kDigits] = {__byte_perm(high01, high23, 0x5410),
                                        __byte_perm(low01, low23, 0x7632),
                                        __byte_perm(low01, low23, 0x5410)};
#pragma unroll
    for (int n = 0; n < kDigits; ++n) {
      *reinterpret_cast<uint32_t*>(digits + n * 64 + t * 16 + word * 4) = by_digit[n];
      sums[n] = __dp4a(static_cast<int>(by_digit[n]), 0x01010101, sums[n]);
    }
  }
  float unit = __uint_as_float(static_cast<uint32_t>(exponent - 21) << 23);
  if (exponent == 255) unit = __uint_as_float(0x7fc00000u);  // NaN, as some x is not finite
  float2 pairs[kDigits];
#pragma unroll
  for (int n = 0; n < kDigits; ++n) {
    int sum = sums[n] << places<kBits>(word);
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const float counts = unit * (n == 0 ? 65536.0f : n == 1 ? 256.0f : 1.0f);
    pairs[n] = make_float2(counts, -zero * static_cast<float>(sum) * counts);
  }
  if (word == 0) factors[0] = make_float4(pairs[0].x, pairs[0].y, pairs[1].x, pairs[1].y);
  if (word == 1) factors[1] = make_float4(pairs[2].x, pairs[2].y, 0.0f, 0.0f);
}

#endif  // MINICPM41_HAS_WGMMA

template <typename T, int kBits, int kRowTiles, int kKWarps>
__global__ void __launch_bounds__(OneTokenShape<kBits, kRowTiles, kKWarps>::kThreads, 2)
    low_bit_linear_one_token_kernel(const OneTokenParams params) {
#ifdef MINICPM41_HAS_WGMMA
  using C = OneTokenShape<kBits, kRowTiles, kKWarps>;
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  __shared__ float sums[2][kKWarps][C::kRows];
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int num_stages = params.num_stages;
  const int k_tiles = params.k_tiles;
  uint8_t* const factors = shared + num_stages * C::kStageBytes;
  uint8_t* const digits = factors + k_tiles * (kTileColumns / kXGroup * kFactorBytes);

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int steps = (k_tiles + kKWarps - 1) / kKWarps;
  const int row_tiles = (params.out_features + kTileRows - 1) / kTileRows;
  const int blocks = (row_tiles + kRowTiles - 1) / kRowTiles;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < num_stages; ++slot) {
      init_barrier(&full[slot], 1);
      init_barrier(&empty[slot], C::kWarps);
    }
    publish_barriers();
  }
  allow_next_launch();
  __syncthreads();

  if (warp == C::kWarps) {
    // No earlier launch writes weights: they need not wait for its end.
    int slot = 0;
    uint32_t parity = 1;  // the phase before the first has ended
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
      const int tile = block * kRowTiles;
      const int tiles = min(kRowTiles, row_tiles - tile);
      for (int step = 0; step < steps; ++step) {
        wait_phase(shared_address(&empty[slot]), parity);
        const int k_tile = step * kKWarps;
        const int count = min(kKWarps, k_tiles - k_tile);
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

  wait_for_previous_launch();
  constexpr int kUnits = kTileColumns / 16;
  const T* x = static_cast<const T*>(params.x);
  const float zero = 0.5f * static_cast<float>(params.zero);
  const int units = k_tiles * kUnits;
  for (int unit = threadIdx.x; unit < (units + kWarpSize - 1) / kWarpSize * kWarpSize;
       unit += C::kConsumers) {
    // Whole warps take part; what lies beyond the end is done again.
    const int group = min(unit / 4, units / 4 - 1);
    split_x<T, kBits>(x + group * kXGroup, unit % 4, zero, digits + group * kXGroupBytes,
                      reinterpret_cast<float4*>(factors + group * kFactorBytes));
  }
  constexpr int kXReady = 1;
  sync_named(kXReady, C::kConsumers);

  const int row_warp = warp / kKWarps;
  const int k_warp = warp % kKWarps;
  const uint8_t* const own_codes = shared + warp * C::kTileBytes + lane * 16;
  const int own_group = params.group_shift > 7 ? 0 : k_warp * params.tile_groups;
  const uint8_t* const own_scales = shared + kRowTiles * C::kRunBytes +
                                    row_warp * C::kScaleRunBytes + own_group * kGroupScaleBytes +
                                    lane / 4 * 4;
  const int second_group = (params.tile_groups - 1) * kGroupScaleBytes;
  // Columns of operand B beyond the digits repeat the last; what they yield is not used.
  const uint8_t* const own_digits =
      digits + k_warp * 2 * kXGroupBytes + min(lane / 4, kDigits - 1) * 64 + lane % 4 * 16;
  const uint8_t* const own_factors = factors + k_warp * 2 * kFactorBytes + min(lane % 4, 1) * 16;
  const uint32_t whole[4] = {kWholeBits, kWholeBits, kWholeBits, kWholeBits};
  int slot = 0, turn = 0;
  uint32_t parity = 0;
  for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
    float acc[4] = {};
    for (int step = 0; step < steps; ++step) {
      wait_phase(&full[slot], parity);
      if (step * kKWarps + k_warp < k_tiles) {
        const uint8_t* codes = own_codes + slot * C::kStageBytes;
        const uint8_t* pairs = own_scales + slot * C::kStageBytes;
        const uint8_t* b_at = own_digits + step * (kKWarps * 2 * kXGroupBytes);
        const uint8_t* factor_at = own_factors + step * (kKWarps * 2 * kFactorBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t a[2][4], d[4];
          Bytes<kBits>::load(codes, half, a);
          const uint4 b = load<uint4>(b_at + half * kXGroupBytes);
          const float4 factor = load<float4>(factor_at + half * kFactorBytes);
          const float2 scale =
              Pair<__nv_bfloat16>::unpack(load<uint32_t>(pairs + half * second_group));
          mma_16x8x32(d, a[0], b.x, b.y, whole);
          mma_16x8x32(d, a[1], b.z, b.w, d);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const float sum = __uint_as_float(d[n]) - kWhole;
            const float part =
                n % 2 ? fmaf(sum, factor.z, factor.w) : fmaf(sum, factor.x, factor.y);
            acc[n] = fmaf(part, n < 2 ? scale.x : scale.y, acc[n]);
          }
        }
      }
      __syncwarp();
      if (lane == 0) arrive(&empty[slot]);
      if (++slot == num_stages) slot = 0, parity ^= 1;
    }
#pragma unroll
    for (int row_half = 0; row_half < 2; ++row_half) {
      float sum = acc[2 * row_half] + acc[2 * row_half + 1];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      if (lane % 4 == 0) {
        sums[turn][k_warp][row_warp * kTileRows + row_half * 8 + lane / 4] = sum;
      }
    }
    // Two sets of sums in turn: who is a block ahead waits here for those who still read.
    sync_named(kXReady, C::kConsumers);
    const int row = threadIdx.x;
    const int n = block * C::kRows + row;
    if (row < C::kRows && n < params.out_features) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kKWarps; ++k) sum += sums[turn][k][row];
      static_cast<T*>(params.out)[n] = static_cast<T>(sum);
    }
    turn ^= 1;
  }
#endif
}

template <typename T, int kBits>
OneTokenLinear describe_one_token() {
  constexpr int kRowTiles = 2, kKWarps = 8;
  using C = OneTokenShape<kBits, kRowTiles, kKWarps>;
  const auto kernel = low_bit_linear_one_token_kernel<T, kBits, kRowTiles, kKWarps>;
  static const bool is_built = holds_kernel(kernel);
  return {kernel, is_built, kRowTiles, C::kThreads, C::kStageBytes, kXTileBytes};
}

template <int kBits>
OneTokenLinear one_token_kernel_for(int32_t dtype) {
  return dtype == kFloat16 ? describe_one_token<__half, kBits>()
                           : describe_one_token<__nv_bfloat16, kBits>();
}

}  // namespace
}  // namespace cuda
}  // namespace minicpm41
