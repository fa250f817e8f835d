// Rows of a low-bit weight as numbers that a library multiplies by: one warp a tile of 16 x 128.
//
// Four lanes first exchange codes, so that each has eight neighbouring columns of a row, which
// leave as one store; a Hadamard transform is undone in fp32 over the lane's own columns and those
// of the three lanes beside it.
#include <cuda_fp8.h>

#include "common.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr char kOp[] = "expand_low_bit_weight";
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRun = 8;  // neighbouring columns of a lane
constexpr int kBlocks = kTileColumns / 32;

// Four lanes hold pairs 0 to 3 of their columns each: afterwards lane t has pair t of each of the
// four, those of lane 0 first. One of two steps: fields under `mask`, which lanes without bit
// `step` keep, and those `shift` bits above.
__device__ __forceinline__ uint32_t exchange(uint32_t word, int step, uint32_t mask, int shift,
                                             int lane) {
  const uint32_t other = __shfl_xor_sync(kAllLanes, word, step);
  return lane & step ? (word & ~mask) | (other & ~mask) >> shift
                     : (word & mask) | (other & mask) << shift;
}
template <int kBits>
__device__ __forceinline__ uint4 turn(const uint4& chunk, int lane) {
  uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (uint32_t& word : words) {
    word = exchange(word, 1,
                    kBits == 2   ? 0x33333333u
                    : kBits == 4 ? 0x0f0f0f0fu
                                 : 0x0000ffffu,
                    kBits == 8 ? 16 : kBits, lane);
    if (kBits < 8)
      word = exchange(word, 2, kBits == 2 ? 0x0f0f0f0fu : 0x00ff00ffu, 2 * kBits, lane);
  }
  if (kBits == 8) {  // pairs 2 and 3 are in the next word
#pragma unroll
    for (int word = 0; word < 4; word += 2) {
      const bool is_high = lane & 2;
      const uint32_t other = __shfl_xor_sync(kAllLanes, is_high ? words[word] : words[word + 1], 2);
      words[word] = is_high ? other : words[word];
      words[word + 1] = is_high ? words[word + 1] : other;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The 8 codes of one block of 32 columns and one half of the rows that a lane holds.
template <int kBits>
__device__ __forceinline__ void decode_run(const uint4 (&chunks)[kBits / 2], int block, int half,
                                           float zero, float (&levels)[kRun]) {
  const uint4 chunk = chunks[kBits == 2 ? 0 : kBits == 4 ? block / 2 : block];
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int pair = 0; pair < kRun / 2; ++pair) {
    const uint32_t word =
        words[kBits == 2 ? 2 * (block / 2) + half
                         : 2 * (kBits == 4 ? block % 2 : half) + (kBits == 4 ? half : pair / 2)];
    const int shift = kBits == 2   ? 2 * (4 * (block % 2) + pair)
                      : kBits == 4 ? 4 * pair
                                   : 16 * (pair % 2);
#pragma unroll
    for (int element = 0; element < 2; ++element) {
      const uint32_t code = word >> (shift + element * (kBits == 8 ? 8 : 16)) & ((1u << kBits) - 1);
      levels[2 * pair + element] = static_cast<float>(code) - zero;
    }
  }
}

// Eight numbers to consecutive addresses.
__device__ __forceinline__ void store_run(__half* to, const float (&v)[kRun]) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(Pair<__half>::pack(v[0], v[1]), Pair<__half>::pack(v[2], v[3]),
                 Pair<__half>::pack(v[4], v[5]), Pair<__half>::pack(v[6], v[7]));
}
__device__ __forceinline__ void store_run(__nv_bfloat16* to, const float (&v)[kRun]) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(Pair<__nv_bfloat16>::pack(v[0], v[1]), Pair<__nv_bfloat16>::pack(v[2], v[3]),
                 Pair<__nv_bfloat16>::pack(v[4], v[5]), Pair<__nv_bfloat16>::pack(v[6], v[7]));
}
__device__ __forceinline__ void store_run(int8_t* to, const float (&v)[kRun]) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const int number = __float2int_rn(fminf(fmaxf(v[i], -127.0f), 127.0f));
    words[i / 4] |= (static_cast<uint32_t>(number) & 0xffu) << (8 * (i % 4));
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
}
__device__ __forceinline__ void store_run(__nv_fp8_e4m3* to, const float (&v)[kRun]) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kRun; i += 2) {
    const uint32_t pair =
        __nv_cvt_float2_to_fp8x2(make_float2(v[i], v[i + 1]), __NV_SATFINITE, __NV_E4M3);
    words[i / 4] |= pair << (8 * (i % 4));
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
}

template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads, 4)
    expand_low_bit_weight_kernel(const ExpandLowBitWeightParams params) {
  const LowBitWeight& weight = params.weight;
  const int lane = threadIdx.x % kWarpSize;
  const int k_tiles = (weight.in_features + kTileColumns - 1) / kTileColumns;
  const int k_tile = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  if (k_tile >= k_tiles) return;
  const int row_tile = params.first_row / kTileRows + blockIdx.y;
  const uint4* codes =
      reinterpret_cast<const uint4*>(weight.qweight + (int64_t{row_tile} * k_tiles + k_tile) *
                                                          (kTileRows * kTileColumns / 8 * kBits));
  uint4 chunks[kBits / 2];
#pragma unroll
  for (int i = 0; i < kBits / 2; ++i)
    chunks[i] = turn<kBits>(__ldg(codes + i * kWarpSize + lane), lane);

  const int groups = weight.in_features / weight.group;
  const float zero = 0.5f * static_cast<float>(weight.zero);
  const int column = k_tile * kTileColumns + lane % 4 * kRun;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = blockIdx.y * kTileRows + half * 8 + lane / 4;  // of out
    const bool is_row = row < params.num_rows;
    float v[kBlocks][kRun];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      decode_run<kBits>(chunks, block, half, zero, v[block]);
      const int group = min((column + 32 * block) / weight.group, groups - 1);
      const uint32_t pair = __ldg(reinterpret_cast<const uint32_t*>(weight.scales) +
                                  (int64_t{row_tile} * groups + group) * 8 + lane / 4);
      const float2 scales = Pair<__nv_bfloat16>::unpack(pair);
      float scale = half == 0 ? scales.x : scales.y;
      if (params.channel_scales != nullptr && is_row) {
        scale /= __ldg(params.channel_scales + params.first_row + row);
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) v[block][i] *= scale;
    }
    if (weight.hadamard > 0) {
      // Bits of a column: 3 within a run, 2 for the lane, 2 for the block.
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int step = 1; step < kRun; step *= 2) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            if (i & step) continue;
            const float a = v[block][i], b = v[block][i + step];
            v[block][i] = a + b;
            v[block][i + step] = a - b;
          }
        }
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            const float other = __shfl_xor_sync(kAllLanes, v[block][i], step);
            v[block][i] = lane & step ? other - v[block][i] : v[block][i] + other;
          }
        }
      }
#pragma unroll
      for (int step = 1; step < kBlocks; step *= 2) {
        if (32 * 2 * step > weight.hadamard) break;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          if (block & step) continue;
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            const float a = v[block][i], b = v[block + step][i];
            v[block][i] = a + b;
            v[block + step][i] = a - b;
          }
        }
      }
      const float norm = rsqrtf(static_cast<float>(weight.hadamard));
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) v[block][i] *= norm;
      }
    }
    T* out = static_cast<T*>(params.out) + int64_t{row} * weight.in_features;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int k = column + 32 * block;
      if (is_row && k < weight.in_features) store_run(out + k, v[block]);
    }
  }
}

template <typename T>
cudaError_t launch_rows(const ExpandLowBitWeightParams& params, void* stream) {
  LaunchShape shape;
  shape.grid = dim3((tile_columns(params.weight) + kWarps - 1) / kWarps,
                    (params.num_rows + kTileRows - 1) / kTileRows);
  shape.threads = kThreads;
  const auto kernel = params.weight.bits == 2   ? expand_low_bit_weight_kernel<T, 2>
                      : params.weight.bits == 4 ? expand_low_bit_weight_kernel<T, 4>
                                                : expand_low_bit_weight_kernel<T, 8>;
  return launch(kernel, shape, stream, params);
}

}  // namespace

Status run_expand_low_bit_weight(const ExpandLowBitWeightParams& params, void* stream) {
  Status status = validate(params);
  if (!status.ok()) return status;
  constexpr int kMaxGridY = 65535;
  Check check(kOp);
  check
      .require(params.dtype != kFloat32, "dtype", std::to_string(params.dtype),
               "1 (float16), 2 (bfloat16), 3 (int8) or 4 (float8_e4m3) on a GPU")
      .require(params.num_rows <= kMaxGridY * kTileRows, "num_rows",
               std::to_string(params.num_rows),
               "at most " + std::to_string(kMaxGridY * kTileRows) + " on a GPU")
      .require(reinterpret_cast<uintptr_t>(params.out) % 16 == 0, "the address of out", "odd",
               "a multiple of 16 on a GPU");
  if (!check.ok()) return check.status();
  Device device;
  status = current_device(kOp, &device);
  if (!status.ok() || params.num_rows == 0) return status;
  const auto run = params.dtype == kFloat16    ? launch_rows<__half>
                   : params.dtype == kBFloat16 ? launch_rows<__nv_bfloat16>
                   : params.dtype == kInt8     ? launch_rows<int8_t>
                                               : launch_rows<__nv_fp8_e4m3>;
  return launch_status(kOp, run(params, stream));
}

}  // namespace cuda
}  // namespace minicpm41
