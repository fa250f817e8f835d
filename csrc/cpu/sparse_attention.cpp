#include <cmath>
#include <limits>

#include "cpu/columns.h"
#include "cpu/parallel.h"
#include "cpu/settings.h"
#include "cpu/step.h"

namespace minicpm41::cpu {
namespace {

// Tokens that walk their lists together, so that a block is fetched and widened once for all of
// them that list it. Their columns fit the second-level cache.
constexpr int kTileTokens = 8;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kNoBlock = std::numeric_limits<int>::max();

// A row's blocks in ascending order: its list, or every causal block.
struct Walk {
  const int32_t* list;  // nullptr: every block
  int length;
  int next = 0;

  int block() const { return next >= length ? kNoBlock : list == nullptr ? next : list[next]; }
};

Walk walk_of_row(const SparseAttentionParams& params, int head, int token, int at) {
  const int own = at / kBlockSize;
  if (at + 1 < params.dense_len) return {nullptr, own + 1};
  const int32_t* list =
      params.topk_idx + (int64_t{head} * params.batch.num_tokens + token) * params.budget;
  const int32_t* end = std::find(list, list + params.budget, -1);
  return {list, static_cast<int>(end - list)};
}

struct TileScratch {
  TileScratch(int head_dim, int columns)
      : keys(kBlockSize * head_dim),
        values(kBlockSize * head_dim),
        q(int64_t{columns} * head_dim * kLanes),
        out(int64_t{columns} * head_dim * kLanes),
        scores(int64_t{columns} * kBlockSize * kLanes),
        row_max(int64_t{columns} * kLanes),
        row_sum(int64_t{columns} * kLanes),
        q_columns(columns),
        score_columns(columns),
        out_columns(columns) {}
  Scratch keys, values, q, out, scores, row_max, row_sum;
  // Columns that take part in the block at hand.
  std::vector<const float*> q_columns;
  std::vector<float*> score_columns, out_columns;
};

class TileAttention {
 public:
  TileAttention(const SparseAttentionParams& params, const BlockKernels& kernels, const Tile& tile,
                int head, TileScratch& scratch)
      : params_(params),
        kernels_(kernels),
        tile_(tile),
        head_(head),
        head_dim_(params.heads.head_dim),
        per_token_(columns_per_token(params.heads)),
        scratch_(scratch) {}

  void run() {
    Walk walks[kTileTokens];
    const int64_t num_columns = int64_t{tile_.num_tokens} * per_token_;
    for (int i = 0; i < tile_.num_tokens; ++i) {
      const int token = tile_.first_token + i;
      walks[i] = walk_of_row(params_, head_, token, position_of(i));
      fill_columns(params_.heads, params_.q, params_.q_stride, token, head_, params_.softmax_scale,
                   q(i * per_token_));
    }
    std::fill_n(out(0), num_columns * head_dim_ * kLanes, 0.0f);
    std::fill_n(row_max(0), num_columns * kLanes, -kInfinity);
    std::fill_n(row_sum(0), num_columns * kLanes, 0.0f);

    while (true) {
      int block = kNoBlock;
      for (int i = 0; i < tile_.num_tokens; ++i) block = std::min(block, walks[i].block());
      if (block == kNoBlock) break;
      const float* keys = widened(params_.k_cache, block, scratch_.keys.get());
      const float* values = widened(params_.v_cache, block, scratch_.values.get());
      int num_whole = 0;
      int whole[kTileTokens];
      for (int i = 0; i < tile_.num_tokens; ++i) {
        if (walks[i].block() != block) continue;
        ++walks[i].next;
        const int visible = std::min(kBlockSize, position_of(i) - block * kBlockSize + 1);
        if (visible == kBlockSize) {
          whole[num_whole++] = i;
        } else {
          attend(&i, 1, keys, values, visible);
        }
      }
      if (num_whole > 0) attend(whole, num_whole, keys, values, kBlockSize);
    }
    with_storage_type(params_.heads.dtype, [&](auto tag) { write<decltype(tag)>(); });
  }

 private:
  int position_of(int i) const {
    return position(params_.batch, tile_.request, tile_.first_token + i);
  }
  float* q(int column) { return scratch_.q.get() + int64_t{column} * head_dim_ * kLanes; }
  float* out(int column) { return scratch_.out.get() + int64_t{column} * head_dim_ * kLanes; }
  float* scores(int column) {
    return scratch_.scores.get() + int64_t{column} * kBlockSize * kLanes;
  }
  float* row_max(int column) { return scratch_.row_max.get() + int64_t{column} * kLanes; }
  float* row_sum(int column) { return scratch_.row_sum.get() + int64_t{column} * kLanes; }

  const float* widened(const void* cache, int block, float* room) {
    const int64_t size = int64_t{kBlockSize} * head_dim_;
    const int64_t offset =
        (page(params_.batch, tile_.request, block) * params_.heads.num_kv_heads + head_) * size;
    const int32_t dtype = params_.heads.dtype;
    if (dtype == kFloat32) return static_cast<const float*>(cache) + offset;
    kernels_.widen(static_cast<const char*>(cache) + offset * dtype_bytes(dtype), dtype, size,
                   room);
    return room;
  }

  // The listed tokens of the tile attend to the first num_keys keys of a block.
  void attend(const int* tokens, int num_tokens, const float* keys, const float* values,
              int num_keys) {
    int n = 0;
    for (int i = 0; i < num_tokens; ++i) {
      for (int c = 0; c < per_token_; ++c, ++n) {
        const int column = tokens[i] * per_token_ + c;
        scratch_.q_columns[n] = q(column);
        scratch_.score_columns[n] = scores(column);
        scratch_.out_columns[n] = out(column);
      }
    }
    kernels_.dot(keys, num_keys, head_dim_, scratch_.q_columns.data(), n,
                 scratch_.score_columns.data());
    for (int i = 0; i < num_tokens; ++i) {
      for (int c = 0; c < per_token_; ++c) {
        const int column = tokens[i] * per_token_ + c;
        kernels_.softmax(scores(column), num_keys, row_max(column), row_sum(column), out(column),
                         head_dim_);
      }
    }
    kernels_.accumulate(values, num_keys, head_dim_, scratch_.score_columns.data(), n,
                        scratch_.out_columns.data());
  }

  template <typename T>
  void write() {
    const auto [num_q_heads, num_kv_heads, head_dim, dtype] = params_.heads;
    const int group_size = num_q_heads / num_kv_heads;
    for (int i = 0; i < tile_.num_tokens; ++i) {
      const int64_t token = tile_.first_token + i;
      for (int member = 0; member < group_size; ++member) {
        const int column = i * per_token_ + member / kLanes, lane = member % kLanes;
        const int head = head_ * group_size + member;
        const float sum = row_sum(column)[lane];
        // A row with an empty list attends to nothing: out 0, lse -inf.
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        const float* from = out(column) + lane;
        T* to =
            static_cast<T*>(params_.out) + token * params_.out_stride + int64_t{head} * head_dim;
        for (int d = 0; d < head_dim; ++d) to[d] = narrow<T>(from[d * kLanes] * inverse);
        if (params_.lse != nullptr) {
          params_.lse[token * num_q_heads + head] = row_max(column)[lane] + std::log(sum);
        }
      }
    }
  }

  const SparseAttentionParams& params_;
  const BlockKernels& kernels_;
  const Tile tile_;
  const int head_;
  const int head_dim_;
  const int per_token_;
  TileScratch& scratch_;
};

// Lists of sparse rows: strictly ascending causal blocks, then -1.
Status check_lists(const SparseAttentionParams& params) {
  const Batch& batch = params.batch;
  for (int head = 0; head < params.heads.num_kv_heads; ++head) {
    for (int token = 0; token < batch.num_tokens; ++token) {
      const int request = batch.batch_id_per_token[token];
      if (request < 0) continue;
      const int at_position = position(batch, request, token);
      if (at_position + 1 < params.dense_len) continue;
      const int32_t* list =
          params.topk_idx + (int64_t{head} * batch.num_tokens + token) * params.budget;
      const int own = at_position / kBlockSize;
      int before = -1;
      for (int i = 0; i < params.budget; ++i) {
        const bool is_end = list[i] == -1;
        if (is_end || (list[i] > before && list[i] <= own)) {
          before = is_end ? kNoBlock : list[i];
          continue;
        }
        return Check("sparse_attention")
            .require(
                false,
                at("topk_idx", head) + "[" + std::to_string(token) + "][" + std::to_string(i) + "]",
                std::to_string(list[i]),
                "ascending block ids from 0 to " + std::to_string(own) + ", then -1")
            .status();
      }
    }
  }
  return {};
}

void clear_padding_rows(const SparseAttentionParams& params) {
  const int num_q_heads = params.heads.num_q_heads;
  const int64_t bytes = dtype_bytes(params.heads.dtype);
  for (int64_t token = 0; token < params.batch.num_tokens; ++token) {
    if (params.batch.batch_id_per_token[token] >= 0) continue;
    std::memset(static_cast<char*>(params.out) + token * params.out_stride * bytes, 0,
                q_row(params.heads) * bytes);
    if (params.lse != nullptr)
      std::fill_n(params.lse + token * num_q_heads, num_q_heads, -kInfinity);
  }
}

}  // namespace

Status run_sparse_attention(const SparseAttentionParams& params, void* /*stream*/) {
  constexpr const char* kOp = "sparse_attention";
  const Batch& batch = params.batch;
  Settings settings;
  if (const Status status = prepare_rows(kOp, params, settings, Extent::kWindow); !status.ok()) {
    return status;
  }
  if (const Status status = check_lists(params); !status.ok()) return status;

  clear_padding_rows(params);
  const std::vector<Tile> tiles = cut_into_tiles(batch, kTileTokens);
  const int num_kv_heads = params.heads.num_kv_heads;
  const int64_t num_items = static_cast<int64_t>(tiles.size()) * num_kv_heads;
  const int num_threads = static_cast<int>(std::min<int64_t>(settings.num_threads, num_items));
  std::vector<TileScratch> scratch;
  for (int thread = 0; thread < num_threads; ++thread) {
    scratch.emplace_back(params.heads.head_dim, kTileTokens * columns_per_token(params.heads));
  }
  // Last tiles first: they are the longest where rows are dense, and should not start last.
  parallel_for(num_threads, num_items, [&](int thread, int64_t item) {
    const int64_t i = num_items - 1 - item;
    TileAttention(params, *settings.kernels, tiles[i / num_kv_heads],
                  static_cast<int>(i % num_kv_heads), scratch[thread])
        .run();
  });
  return {};
}

}  // namespace minicpm41::cpu
