// What the two decode attention kernels share: partial results and the one way they are merged.
#pragma once

#include "prefill.h"

namespace minicpm41 {
namespace cuda {

// sparse_decode on Hopper; whether this library holds it for the current device.
Status sparse_decode_sm90(const SparseAttentionParams& params, const Device& device, void* stream);
bool has_sparse_decode_sm90(const Device& device);

// The warps that compute: each scores 8 keys of a block and sums 16 dimensions of its values.
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpKeys = kBlockSize / kWarps;
constexpr int kWarpDims = kHeadDim / kWarps;
static_assert(kWarpKeys == 8 && kWarpDims == 16, "one n-tile of keys, two of dimensions a warp");
// A list is cut into lanes by its length alone; four of them are merged at a time.
constexpr int kLanes = 16;
constexpr int kGroupLanes = 4;
constexpr int kTileBytes = kBlockSize * kRowBytes;
constexpr int kQStride = kRowBytes + kChunkBytes;

// Whether a dense row may be so much longer than the others that every list is cut as far as it
// goes.
inline bool has_long_rows(const SparseAttentionParams& params) {
  const int dense_blocks =
      std::min(params.batch.max_blocks, std::max(params.dense_len, 0) / kBlockSize + 1);
  return dense_blocks > 2 * params.budget;
}

// The one way two partial results become one; explicit roundings, so that it gives the same bits
// wherever it is inlined.
struct Weights {
  float peak, mine, other;
};
__device__ __forceinline__ Weights merge_weights(float peak, float other_peak) {
  const float larger = fmaxf(peak, other_peak);
  const float base = larger == -INFINITY ? 0.0f : larger;
  return {larger, exp2_approx(__fsub_rn(peak, base)), exp2_approx(__fsub_rn(other_peak, base))};
}
__device__ __forceinline__ float merged(const Weights& w, float mine, float other) {
  return __fmaf_rn(mine, w.mine, __fmul_rn(other, w.other));
}

// Partial result of two heads (lane / 4 and + 8) and four dimensions of each: 8 n + 2 (lane % 4).
struct Partial {
  float peak[2];  // of softmax_scale * log2(e) * q.k
  float sum[2];
  float out[2][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      peak[r] = -INFINITY;
      sum[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) out[r][i] = 0.0f;
    }
  }
};
__device__ __forceinline__ void merge(Partial& into, const Partial& from) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Weights w = merge_weights(into.peak[r], from.peak[r]);
    into.peak[r] = w.peak;
    into.sum[r] = merged(w, into.sum[r], from.sum[r]);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      into.out[n][2 * r] = merged(w, into.out[n][2 * r], from.out[n][2 * r]);
      into.out[n][2 * r + 1] = merged(w, into.out[n][2 * r + 1], from.out[n][2 * r + 1]);
    }
  }
}

__device__ __forceinline__ float inverse(float sum) { return sum > 0.0f ? __frcp_rn(sum) : 0.0f; }
__device__ __forceinline__ float natural_lse(float peak, float sum) {
  return sum > 0.0f ? (peak + log2f(sum)) * kLn2 : -INFINITY;
}

template <typename T>
__device__ __forceinline__ void store_pair(T* target, float x, float y) {
  *reinterpret_cast<uint32_t*>(target) = Pair<T>::pack(x, y);
}

template <typename T>
__device__ __forceinline__ void write_padding(const SparseAttentionParams& params, int token,
                                              int kv_head) {
  for (int i = threadIdx.x; i < kGroupSize * kHeadDim / 2; i += blockDim.x) {
    store_pair(static_cast<T*>(params.out) + token * params.out_stride +
                   kv_head * kGroupSize * kHeadDim + 2 * i,
               0.0f, 0.0f);
  }
  if (params.lse != nullptr && threadIdx.x < kGroupSize) {
    params.lse[int64_t{token} * params.heads.num_q_heads + kv_head * kGroupSize + threadIdx.x] =
        -INFINITY;
  }
}

}  // namespace cuda
}  // namespace minicpm41
