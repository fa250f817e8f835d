// What the two prefill attention kernels share: which rows of a tile attend to a block, and one
// token's softmax and output, a warp each.
#pragma once

#include "prefill_tiles.cuh"

namespace minicpm41 {
namespace cuda {

// sparse_prefill for sm_90a, and whether this build holds it.
Status sparse_prefill_sm90(const SparseAttentionParams& params, const Device& device, void* stream);
int64_t sparse_prefill_sm90_workspace(const SparseAttentionParams& params, const Device& device);
bool has_sparse_prefill_sm90();

// ---- which rows attend to a block ----

// Blocks up to the own block of the tile's last row, of those that the block table can name.
__device__ __forceinline__ int blocks_of(const Batch& batch, const Tile& tile) {
  return min((tile.position + tile.rows - 1) / kBlockSize + 1, batch.max_blocks);
}
// Rows of the tile under dense_len; they come first.
__device__ __forceinline__ int dense_rows_of(const SparseAttentionParams& params,
                                             const Tile& tile) {
  return min(max(params.dense_len - 1 - tile.position, 0), tile.rows);
}

// A mark is 16 bits: bit r is set if row r of the tile attends to the block. Marks are made for
// kMarkedBlocks blocks at a time, 128K tokens, two in a word.
constexpr int kMarkedBlocks = 2048;
constexpr int kMarkBits = 16;

// Marks blocks [base, base + count) for the dense rows, and clears the other bits.
__device__ __forceinline__ void mark_dense(uint32_t* marks, const SparseAttentionParams& params,
                                           const Tile& tile, int base, int count, int thread,
                                           int threads) {
  const uint32_t dense = (1u << dense_rows_of(params, tile)) - 1;
  // Without the rows that stand before the block.
  const auto mark = [&](int block) {
    const int before = min(max(block * kBlockSize - tile.position, 0), kMarkBits);
    return dense >> before << before;
  };
  for (int word = thread; 2 * word < count; word += threads) {
    marks[word] = mark(base + 2 * word) | mark(base + 2 * word + 1) << kMarkBits;
  }
}
// Waits for the lists of the other rows, which select_blocks may still be making; before a barrier.
__device__ __forceinline__ void await_lists(const SparseAttentionParams& params, const Tile& tile,
                                            int kv_head, int thread) {
  if (thread < dense_rows_of(params, tile) || thread >= tile.rows) return;
  const int64_t row = int64_t{kv_head} * params.batch.num_tokens + tile.row + thread;
  await_list(params.topk_idx + (row + 1) * params.budget - 1);
}
// Adds the lists of the other rows, after a barrier.
__device__ __forceinline__ void mark_listed(uint32_t* marks, const SparseAttentionParams& params,
                                            const Tile& tile, int kv_head, int base, int count,
                                            int thread, int threads) {
  constexpr int kAtOnce = 4;  // trips to memory
  const int dense = dense_rows_of(params, tile);
  const int32_t* list =
      params.topk_idx +
      (int64_t{kv_head} * params.batch.num_tokens + tile.row + dense) * params.budget;
  const int entries = (tile.rows - dense) * params.budget;
  for (int first = thread; first < entries; first += kAtOnce * threads) {
    int ids[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int entry = first + i * threads;
      ids[i] = entry < entries ? __ldcg(list + entry) : -1;  // L1 may hold older ones
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = dense + (first + i * threads) / params.budget;
      const int at = ids[i] - base;
      if (at >= 0 && at < count && ids[i] <= (tile.position + row) / kBlockSize) {
        atomicOr(marks + at / 2, 1u << (row + at % 2 * kMarkBits));
      }
    }
  }
}

// Walks the marked blocks in ascending order, a warp together. A block whose page is absent is
// passed over.
class MarkedBlocks {
 public:
  // From block `first` on; `pages` are those of block 0 on, as are marks.
  __device__ __forceinline__ MarkedBlocks(const uint32_t* marks, const int32_t* pages, int first,
                                          int count, int num_pages, int lane)
      : marks_(reinterpret_cast<const uint16_t*>(marks)),
        pages_(pages),
        count_(count),
        num_pages_(num_pages),
        lane_(lane),
        first_(first) {
    fetch(first + lane);
  }
  // False at the end. `block` counts from the first marked one.
  __device__ __forceinline__ bool next(int* block, int* mark, int* page) {
    while (wanted_ == 0) {
      if (first_ >= count_) return false;
      mark_ = next_mark_;
      page_ = next_page_;
      fetch(first_ + kWarpSize + lane_);  // a trip to memory ahead
      wanted_ = __ballot_sync(kAllLanes, page_ >= 0 && page_ < num_pages_);
      first_ += kWarpSize;
    }
    const int from = __ffs(wanted_) - 1;
    wanted_ &= wanted_ - 1;
    *block = first_ - kWarpSize + from;
    *mark = __shfl_sync(kAllLanes, mark_, from);
    *page = __shfl_sync(kAllLanes, page_, from);
    return true;
  }

 private:
  __device__ __forceinline__ void fetch(int at) {
    next_mark_ = at < count_ ? marks_[at] : 0;
    next_page_ = next_mark_ != 0 ? __ldg(pages_ + at) : -1;
  }

  const uint16_t* marks_;
  const int32_t* pages_;
  int count_, num_pages_, lane_;
  int first_;
  int mark_ = 0, page_ = -1, next_mark_, next_page_;
  unsigned wanted_ = 0;
};

// ---- one token in one warp ----

// Scores and weights of 16 heads and the 64 keys of a block: thread `lane` holds heads
// lane / 4 + 8 r and keys 8 n + 2 (lane % 4) + c at [4 n + 2 r + c], as mma and wgmma leave them.
constexpr int kScores = kBlockSize / 2;
// Likewise the output, with 128 dimensions in place of the keys.
constexpr int kOutputs = kHeadDim / 2;

// The softmax of a token's heads so far, and the output that it weighs.
struct Softmax {
  float peak[2];  // what weights are relative to: softmax_scale * log2(e) * q.k of some key
  float sum[2];   // of this thread's weights
  float out[kOutputs];

  __device__ __forceinline__ void clear() {
    // Finite and below every score: the first weights are too large, and weigh finds the peak.
    peak[0] = peak[1] = -1e30f;
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) out[i] = 0.0f;
  }
};

// Weights of the scores relative to the peaks, packed as operand A of the products with 16 keys
// each. False if one of them is too large.
template <typename T>
__device__ __forceinline__ bool pack_weights(uint32_t (&weights)[kBlockSize / 16][4],
                                             const float (&scores)[kScores], const float (&peak)[2],
                                             float (&sum)[2], float scale_log2) {
  // A sum of 16 weights bounds each: they stay far below the largest float16.
  constexpr float kLargest = 1024.0f;
  float odd[2];
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) {
    const int r = i % 2;
    const float x = exp2_approx(__fmaf_rn(scores[2 * i], scale_log2, -peak[r]));
    const float y = exp2_approx(__fmaf_rn(scores[2 * i + 1], scale_log2, -peak[r]));
    sum[r] = i < 2 ? x : sum[r] + x;
    odd[r] = i < 2 ? y : odd[r] + y;
    weights[i / 4][i % 4] = Pair<T>::pack(x, y);
  }
  sum[0] += odd[0];
  sum[1] += odd[1];
  return sum[0] <= kLargest && sum[1] <= kLargest;
}

// Turns scores into weights. The peaks need not be the largest scores so far, for weights of up to
// 2^10 are as exact in 16 bits as those up to 1: the largest scores are looked for only when
// weights become larger than that, which the first of all do. `state.out` must not be in use.
template <typename T>
__device__ __forceinline__ void weigh(uint32_t (&weights)[kBlockSize / 16][4],
                                      float (&scores)[kScores], Softmax& state, float scale_log2,
                                      int last_key, int lane) {
  if (last_key < kBlockSize - 1) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (i / 4 * 8 + lane % 4 * 2 + i % 2 > last_key) scores[i] = -INFINITY;
    }
  }
  float sum[2];
  if (__any_sync(kAllLanes, !pack_weights<T>(weights, scores, state.peak, sum, scale_log2))) {
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float peak = scores[2 * r];
#pragma unroll
      for (int i = 2 * r; i < kScores; i += 4) {
        peak = fmaxf(peak, fmaxf(scores[i], scores[i + 1]));
      }
      peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 2)) * scale_log2;
      peak = fmaxf(peak, state.peak[r]);
      shrink[r] = exp2_approx(state.peak[r] - peak);
      state.peak[r] = peak;
      state.sum[r] *= shrink[r];
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) state.out[i] *= shrink[i / 2 % 2];
    pack_weights<T>(weights, scores, state.peak, sum, scale_log2);
  }
  state.sum[0] += sum[0];
  state.sum[1] += sum[1];
}

template <typename T>
__device__ __forceinline__ void write_row(const SparseAttentionParams& params, int row, int kv_head,
                                          const Softmax& state, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const float scale = sum > 0.0f ? __frcp_rn(sum) : 0.0f;
    const int head = kv_head * kGroupSize + lane / 4 + 8 * r;
    T* target =
        static_cast<T*>(params.out) + row * params.out_stride + head * kHeadDim + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const int i = 4 * n + 2 * r;
      *reinterpret_cast<uint32_t*>(target + 8 * n) =
          Pair<T>::pack(state.out[i] * scale, state.out[i + 1] * scale);
    }
    if (params.lse != nullptr && lane % 4 == 0) {
      params.lse[int64_t{row} * params.heads.num_q_heads + head] =
          sum > 0.0f ? (state.peak[r] + log2f(sum)) * kLn2 : -INFINITY;
    }
  }
}

}  // namespace cuda
}  // namespace minicpm41
