// What the two prefill attention kernels share: tiles of neighbouring rows of one request, which of
// a tile's rows attend to a block, and one token's softmax and output, a warp each.
#pragma once

#include "prefill.h"

namespace minicpm41 {
namespace cuda {

// sparse_prefill for sm_90a, and whether this build holds it.
Status sparse_prefill_sm90(const SparseAttentionParams& params, void* stream);
bool has_sparse_prefill_sm90();

// ---- tiles ----

// Up to kTokens rows of one request. A call may be a window of a longer step: cu_seqlens_q may
// begin below 0 and end past num_tokens. Where a tile is cut does not show in a row's bits: blocks
// that only its neighbours list leave no trace in its sums.
struct Tile {
  int request;
  int row;  // its first
  int rows;
  int position;  // of its first row
};

// No step of these shapes has more tiles.
inline int64_t most_tiles(const Batch& batch, int tokens) {
  return (batch.num_tokens + tokens - 1) / tokens + int64_t{batch.batch_size};
}

// Tiles of a request, and where its rows lie in this call.
template <int kTokens>
__device__ __forceinline__ int tiles_of(const Batch& batch, int request, int* first_row,
                                        int* num_rows) {
  *num_rows = *first_row = 0;
  if (request >= batch.batch_size) return 0;
  const int query_len = __ldg(batch.query_lens + request);
  if (!is_prefill(query_len)) return 0;
  const int begin = __ldg(batch.cu_seqlens_q + request);
  *first_row = max(begin, 0);
  *num_rows = max(min(begin + query_len, batch.num_tokens) - *first_row, 0);
  return (*num_rows + kTokens - 1) / kTokens;
}

// Tiles of the call. Called by whole warps, as is find_tile.
template <int kTokens>
__device__ __forceinline__ int count_tiles(const Batch& batch, int lane) {
  int total = 0;
  for (int first = 0; first < batch.batch_size; first += kWarpSize) {
    int row, rows;
    total += __reduce_add_sync(kAllLanes, tiles_of<kTokens>(batch, first + lane, &row, &rows));
  }
  return total;
}

// Tile `index` of the call, which has more than that.
template <int kTokens>
__device__ __forceinline__ Tile find_tile(const Batch& batch, int index, int lane) {
  for (int first = 0;; first += kWarpSize) {
    int row, rows;
    const int count = tiles_of<kTokens>(batch, first + lane, &row, &rows);
    int end = count;  // running sum
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += before;
    }
    const unsigned holds = __ballot_sync(kAllLanes, index < end);
    if (holds == 0) {
      index -= __shfl_sync(kAllLanes, end, kWarpSize - 1);
      continue;
    }
    const int owner = __ffs(holds) - 1;
    const int skipped = (index - __shfl_sync(kAllLanes, end - count, owner)) * kTokens;
    Tile tile;
    tile.request = first + owner;
    tile.row = __shfl_sync(kAllLanes, row, owner) + skipped;
    tile.rows = min(kTokens, __shfl_sync(kAllLanes, rows, owner) - skipped);
    tile.position = __ldg(batch.history_lens + tile.request) + tile.row -
                    __ldg(batch.cu_seqlens_q + tile.request);
    return tile;
  }
}

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
// Adds the lists of the other rows, after a barrier.
__device__ __forceinline__ void mark_listed(uint32_t* marks, const SparseAttentionParams& params,
                                            const Tile& tile, int kv_head, int base, int count,
                                            int thread, int threads) {
  int row = dense_rows_of(params, tile);
  const int32_t* list =
      params.topk_idx +
      (int64_t{kv_head} * params.batch.num_tokens + tile.row + row) * params.budget;
#pragma unroll 4
  for (; row < tile.rows; ++row, list += params.budget) {
    const int own = (tile.position + row) / kBlockSize;
    for (int i = thread; i < params.budget; i += threads) {
      const int id = __ldg(list + i);
      const int at = id - base;
      if (at >= 0 && at < count && id <= own) {
        atomicOr(marks + at / 2, 1u << (row + at % 2 * kMarkBits));
      }
    }
  }
}

// Walks the marked blocks in ascending order, a warp together. A block whose page is absent is
// passed over.
class MarkedBlocks {
 public:
  // `pages` are those of the first marked block on.
  __device__ __forceinline__ MarkedBlocks(const uint32_t* marks, const int32_t* pages, int count,
                                          int num_pages, int lane)
      : marks_(reinterpret_cast<const uint16_t*>(marks)),
        pages_(pages),
        count_(count),
        num_pages_(num_pages),
        lane_(lane) {
    fetch(lane);
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
  int first_ = 0;
  int mark_ = 0, page_ = -1, next_mark_, next_page_;
  unsigned wanted_ = 0;
};

// ---- one token in one warp ----

// Scores and weights of 16 heads and the 64 keys of a block: thread `lane` holds heads
// lane / 4 + 8 r and keys 8 n + 2 (lane % 4) + c at [4 n + 2 r + c], as mma and wgmma leave them.
constexpr int kScores = kBlockSize / 2;
// Likewise the output, with 128 dimensions in place of the keys.
constexpr int kOutputs = kHeadDim / 2;

struct Softmax {
  float peak[2];  // of softmax_scale * log2(e) * q.k, or less: see weigh
  float sum[2];   // of this thread's weights

  __device__ __forceinline__ void clear() {
    // Finite, so that -inf scores below it do not make a NaN.
    peak[0] = peak[1] = -1e30f;
    sum[0] = sum[1] = 0.0f;
  }
};

// Turns scores into weights. True if the output so far must be multiplied by `shrink`: not at every
// new maximum but once it has grown by a factor of 2^8, which costs no accuracy, since weights of
// up to 2^8 are as exact in 16 bits as those up to 1.
__device__ __forceinline__ bool weigh(float (&scores)[kScores], Softmax& state, float (&shrink)[2],
                                      float scale_log2, int last_key, int lane) {
  constexpr float kTolerated = 8.0f;
  if (last_key < kBlockSize - 1) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (i / 4 * 8 + lane % 4 * 2 + i % 2 > last_key) scores[i] = -INFINITY;
    }
  }
  float peak[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float even = scores[2 * r], odd = scores[2 * r + 1];
#pragma unroll
    for (int i = 4 + 2 * r; i < kScores; i += 4) {
      even = fmaxf(even, scores[i]);
      odd = fmaxf(odd, scores[i + 1]);
    }
    peak[r] = fmaxf(even, odd);
    peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAllLanes, peak[r], 1));
    peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAllLanes, peak[r], 2)) * scale_log2;
  }
  const bool grows = __any_sync(
      kAllLanes, peak[0] > state.peak[0] + kTolerated || peak[1] > state.peak[1] + kTolerated);
  if (grows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float larger = fmaxf(state.peak[r], peak[r]);
      shrink[r] = exp2_approx(state.peak[r] - larger);
      state.peak[r] = larger;
      state.sum[r] *= shrink[r];
    }
  }
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    scores[i] = exp2_approx(__fmaf_rn(scores[i], scale_log2, -state.peak[i / 2 % 2]));
  }
  return grows;
}

// Adds the weights to the sums. Apart from weigh, so that no addition that waits for its
// exponential holds up the exponentials behind it.
__device__ __forceinline__ void add_weights(const float (&scores)[kScores], Softmax& state) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float even = scores[2 * r], odd = scores[2 * r + 1];
#pragma unroll
    for (int i = 4 + 2 * r; i < kScores; i += 4) {
      even += scores[i];
      odd += scores[i + 1];
    }
    state.sum[r] += even + odd;
  }
}

// The same weights as operand A of the products with 16 keys each.
template <typename T>
__device__ __forceinline__ void pack_weights(uint32_t (&weights)[kBlockSize / 16][4],
                                             const float (&scores)[kScores]) {
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) {
    weights[i / 4][i % 4] = Pair<T>::pack(scores[2 * i], scores[2 * i + 1]);
  }
}

template <typename T>
__device__ __forceinline__ void write_row(const SparseAttentionParams& params, int row, int kv_head,
                                          const float (&out)[kOutputs], const Softmax& state,
                                          int lane) {
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
          Pair<T>::pack(out[i] * scale, out[i + 1] * scale);
    }
    if (params.lse != nullptr && lane % 4 == 0) {
      params.lse[int64_t{row} * params.heads.num_q_heads + head] =
          sum > 0.0f ? (state.peak[r] + log2f(sum)) * kLn2 : -INFINITY;
    }
  }
}

}  // namespace cuda
}  // namespace minicpm41
