#include <cmath>
#include <functional>
#include <limits>

#include "cpu/columns.h"
#include "cpu/parallel.h"
#include "cpu/settings.h"
#include "cpu/step.h"

namespace minicpm41::cpu {
namespace {

constexpr int kTileTokens = 8;
constexpr int kChunkWindows = 64;
constexpr int kChunkBlocks = kChunkWindows / kFineSlots;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct TileScratch {
  TileScratch(const Heads& heads, int max_blocks)
      : columns(kTileTokens * columns_per_token(heads)),
        // One chunk may be written whole where its first window is the last one wanted.
        row_windows(int64_t{max_blocks} * kFineSlots + kChunkWindows),
        keys(kChunkWindows * heads.head_dim),
        q(int64_t{columns} * heads.head_dim * kLanes),
        scores(int64_t{columns} * kChunkWindows * kLanes),
        lse(int64_t{columns} * kLanes),
        row_sum(int64_t{columns} * kLanes),
        window_scores(kTileTokens * row_windows),
        candidates(max_blocks),
        ordered(max_blocks),
        row_scores(columns_per_token(heads)),
        row_lse(columns_per_token(heads)) {}
  const int columns;
  const int64_t row_windows;
  Scratch keys, q, scores, lse, row_sum, window_scores;
  std::vector<float> candidates, ordered;
  std::vector<const float*> row_scores, row_lse;  // columns of the row at hand
};

// A row that has to choose: it has more blocks than the budget.
struct Row {
  int token;
  int position;
  int num_windows;         // fine windows it sees
  int num_coarse_windows;  // coarse windows it sees
  int last_candidate;      // the last block before the local ones
};

class TileSelection {
 public:
  TileSelection(const SelectBlocksParams& params, const BlockKernels& kernels, const Tile& tile,
                int head, TileScratch& scratch)
      : params_(params),
        kernels_(kernels),
        tile_(tile),
        head_(head),
        head_dim_(params.heads.head_dim),
        per_token_(columns_per_token(params.heads)),
        num_chosen_(params.budget - params.init_blocks - params.local_blocks),
        scratch_(scratch) {}

  void run() {
    for (int token = tile_.first_token; token < tile_.first_token + tile_.num_tokens; ++token) {
      const int at = position(params_.batch, tile_.request, token);
      const int own = at / kBlockSize;
      if (own + 1 <= params_.budget || at + 1 < params_.dense_len) {
        int32_t* list = list_of(token);
        for (int i = 0; i < params_.budget; ++i) list[i] = i <= own ? i : -1;
        continue;
      }
      rows_[num_rows_++] = {token, at, std::max(0, (at + 1) / kKernelStride - 1),
                            std::max(0, (at + 1) / kCoarseKernelStride - 1),
                            own - params_.local_blocks};
    }
    if (num_rows_ == 0) return;
    if (num_chosen_ > 0) {
      for (int i = 0; i < num_rows_; ++i) {
        fill_columns(params_.heads, params_.q, params_.q_stride, rows_[i].token, head_,
                     params_.softmax_scale, q(i));
      }
      find_normalisers();
      score_windows();
    }
    for (int i = 0; i < num_rows_; ++i) choose(i);
  }

 private:
  int32_t* list_of(int token) const {
    return params_.topk_idx + (int64_t{head_} * params_.batch.num_tokens + token) * params_.budget;
  }
  float* q(int row) { return scratch_.q.get() + int64_t{row} * per_token_ * head_dim_ * kLanes; }
  float* scores(int column) {
    return scratch_.scores.get() + int64_t{column} * kChunkWindows * kLanes;
  }
  float* lse(int column) { return scratch_.lse.get() + int64_t{column} * kLanes; }
  float* row_sum(int column) { return scratch_.row_sum.get() + int64_t{column} * kLanes; }
  float* window_scores(int row) {
    return scratch_.window_scores.get() + row * scratch_.row_windows;
  }

  // Copies the compressed keys stored with a block to chunk row `to`.
  void gather(const void* cache, int block, int slots, int to) {
    const int64_t size = int64_t{slots} * head_dim_;
    const int64_t offset =
        (page(params_.batch, tile_.request, block) * params_.heads.num_kv_heads + head_) * size;
    const int32_t dtype = params_.heads.dtype;
    kernels_.widen(static_cast<const char*>(cache) + offset * dtype_bytes(dtype), dtype, size,
                   scratch_.keys.get() + int64_t{to} * head_dim_);
  }

  void dot_chunk(int num_windows) {
    const int num_columns = num_rows_ * per_token_;
    const float* q_columns[2];
    float* score_columns[2];
    for (int column = 0; column < num_columns; column += 2) {
      const int n = std::min(2, num_columns - column);
      for (int i = 0; i < n; ++i) {
        q_columns[i] = scratch_.q.get() + int64_t{column + i} * head_dim_ * kLanes;
        score_columns[i] = scores(column + i);
      }
      kernels_.dot(scratch_.keys.get(), num_windows, head_dim_, q_columns, n, score_columns);
    }
  }

  // lse of each lane over the coarse windows its row sees; +inf in lanes without a head.
  void find_normalisers() {
    const int num_columns = num_rows_ * per_token_;
    std::fill_n(lse(0), num_columns * kLanes, -kInfinity);
    std::fill_n(row_sum(0), num_columns * kLanes, 0.0f);
    const int end = rows_[num_rows_ - 1].num_coarse_windows;  // rows stand in order of position
    for (int first = 0; first < end; first += kChunkWindows) {
      const int chunk = std::min(kChunkWindows, end - first);
      // Coarse window i ends with block i + 1, and is stored there.
      for (int i = 0; i < chunk; ++i) gather(params_.k2_cache, first + i + 1, kCoarseSlots, i);
      dot_chunk(chunk);
      for (int column = 0; column < num_columns; ++column) {
        const int seen = rows_[column / per_token_].num_coarse_windows - first;
        if (seen <= 0) continue;
        kernels_.softmax(scores(column), std::min(chunk, seen), lse(column), row_sum(column),
                         nullptr, 0);
      }
    }
    const int group_size = params_.heads.num_q_heads / params_.heads.num_kv_heads;
    for (int column = 0; column < num_columns; ++column) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool has_head = column % per_token_ * kLanes + lane < group_size;
        const float sum = row_sum(column)[lane];
        if (!has_head) {
          lse(column)[lane] = kInfinity;
        } else if (sum == 0.0f) {
          lse(column)[lane] = 0.0f;  // sees no coarse window: nothing to normalise by
        } else {
          lse(column)[lane] += std::log(sum);
        }
      }
    }
  }

  // Fine window j is stored in slot j + 1 counted over all blocks, which is how it is indexed here:
  // block b overlaps windows 4b .. 4b + 4, and there is no window 0.
  void score_windows() {
    const int last_block = rows_[num_rows_ - 1].last_candidate + 1;
    for (int first = params_.init_blocks; first <= last_block; first += kChunkBlocks) {
      const int chunk = std::min(kChunkBlocks, last_block - first + 1);
      for (int i = 0; i < chunk; ++i) {
        gather(params_.k1_cache, first + i, kFineSlots, i * kFineSlots);
      }
      dot_chunk(chunk * kFineSlots);
      for (int row = 0; row < num_rows_; ++row) {
        for (int c = 0; c < per_token_; ++c) {
          scratch_.row_scores[c] = scores(row * per_token_ + c);
          scratch_.row_lse[c] = lse(row * per_token_ + c);
        }
        kernels_.group_score(scratch_.row_scores.data(), scratch_.row_lse.data(), per_token_,
                             chunk * kFineSlots, window_scores(row) + first * kFineSlots);
      }
    }
  }

  // NaN ranks with the lowest: a comparison with it is never true.
  float block_score(int row, int block) {
    const int first = std::max(1, block * kFineSlots);
    const int last = std::min(rows_[row].num_windows, (block + 1) * kFineSlots);
    float best = -kInfinity;
    for (int window = first; window <= last; ++window) {
      const float score = window_scores(row)[window];
      if (score > best) best = score;
    }
    return best;
  }

  // Writes the forced blocks and the best of the others, ascending; ties go to the lower id.
  void choose(int i) {
    const Row& row = rows_[i];
    int32_t* list = list_of(row.token);
    for (int block = 0; block < params_.init_blocks; ++block) *list++ = block;
    if (num_chosen_ > 0) {
      const int first = params_.init_blocks;
      const int num_candidates = row.last_candidate - first + 1;
      float* candidates = scratch_.candidates.data();
      for (int c = 0; c < num_candidates; ++c) candidates[c] = block_score(i, first + c);
      float* ordered = scratch_.ordered.data();
      std::copy_n(candidates, num_candidates, ordered);
      std::nth_element(ordered, ordered + num_chosen_ - 1, ordered + num_candidates,
                       std::greater<float>());
      const float threshold = ordered[num_chosen_ - 1];
      int ties = num_chosen_;
      for (int c = 0; c < num_candidates; ++c) ties -= candidates[c] > threshold;
      for (int c = 0; c < num_candidates; ++c) {
        const bool is_tie = candidates[c] == threshold;
        if (candidates[c] > threshold || (is_tie && ties > 0)) *list++ = first + c;
        ties -= is_tie;
      }
    }
    for (int block = row.last_candidate + 1; block <= row.position / kBlockSize; ++block) {
      *list++ = block;
    }
  }

  const SelectBlocksParams& params_;
  const BlockKernels& kernels_;
  const Tile tile_;
  const int head_;
  const int head_dim_;
  const int per_token_;
  const int num_chosen_;
  Row rows_[kTileTokens];
  int num_rows_ = 0;
  TileScratch& scratch_;
};

}  // namespace

Status run_select_blocks(const SelectBlocksParams& params, void* /*stream*/) {
  constexpr const char* kOp = "select_blocks";
  const Batch& batch = params.batch;
  Settings settings;
  if (const Status status = prepare_rows(kOp, params, settings, Extent::kWindow); !status.ok()) {
    return status;
  }

  const std::vector<Tile> tiles = cut_into_tiles(batch, kTileTokens);
  const int num_kv_heads = params.heads.num_kv_heads;
  const int64_t num_items = static_cast<int64_t>(tiles.size()) * num_kv_heads;
  const int num_threads = static_cast<int>(std::min<int64_t>(settings.num_threads, num_items));
  std::vector<TileScratch> scratch;
  for (int thread = 0; thread < num_threads; ++thread) {
    scratch.emplace_back(params.heads, batch.max_blocks);
  }
  // Last tiles first: they are the longest, and should not start last.
  parallel_for(num_threads, num_items, [&](int thread, int64_t item) {
    const int64_t i = num_items - 1 - item;
    TileSelection(params, *settings.kernels, tiles[i / num_kv_heads],
                  static_cast<int>(i % num_kv_heads), scratch[thread])
        .run();
  });
  return {};
}

}  // namespace minicpm41::cpu
