// One step's requests as the CPU side walks them: their values checked, then cut into tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/settings.h"
#include "validate.h"

namespace minicpm41::cpu {

inline std::string at(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

inline int32_t kv_len(const Batch& batch, int request) {
  return batch.history_lens[request] + batch.query_lens[request];
}

inline int32_t position(const Batch& batch, int request, int token) {
  return batch.history_lens[request] + token - batch.cu_seqlens_q[request];
}

inline int64_t page(const Batch& batch, int request, int block) {
  return batch.block_tables[int64_t{request} * batch.max_blocks + block];
}

// What the rows of a call may be: all of a step, or a window of them (params.h).
enum class Extent { kStep, kWindow };

// Every value the ops follow to an address: the lengths fit the table, the table entries in use are
// pages, tokens and requests agree. Entries beyond a request's length are never read, nor is
// anything of an idle slot.
inline Status check_values(const char* op, const Batch& batch, Extent extent = Extent::kStep) {
  Check check(op);
  int64_t tokens = 0;
  if (extent == Extent::kWindow && batch.batch_size > 0) {
    tokens = batch.cu_seqlens_q[0];
    check.require(tokens <= 0, at("cu_seqlens_q", 0), std::to_string(tokens),
                  "at most 0, where the step begins");
  }
  for (int b = 0; b < batch.batch_size && check.ok(); ++b) {
    const int64_t query_len = batch.query_lens[b];
    check.at_least(at("query_lens", b).c_str(), query_len, 0)
        .require(query_len <= batch.max_query_len, at("query_lens", b), std::to_string(query_len),
                 "at most max_query_len (" + std::to_string(batch.max_query_len) + ")");
    check.require(batch.cu_seqlens_q[b] == tokens, at("cu_seqlens_q", b),
                  std::to_string(batch.cu_seqlens_q[b]),
                  std::to_string(tokens) + ", the sum of query_lens before it");
    if (!check.ok() || query_len == 0) continue;
    tokens += query_len;
    const int64_t history_len = batch.history_lens[b];
    const int64_t capacity = int64_t{batch.max_blocks} * kBlockSize;
    check.at_least(at("history_lens", b).c_str(), history_len, 0)
        .require(history_len + query_len <= capacity, at("history_lens", b) + " + query_lens",
                 std::to_string(history_len + query_len),
                 "at most " + std::to_string(capacity) + ", what " +
                     std::to_string(batch.max_blocks) + " blocks of the table hold");
    if (!check.ok()) break;
    const int blocks = static_cast<int>((history_len + query_len - 1) / kBlockSize) + 1;
    for (int block = 0; block < blocks; ++block) {
      const int64_t id = page(batch, b, block);
      if (id >= 0 && id < batch.num_pages) continue;
      check.require(false, at("block_tables", b) + "[" + std::to_string(block) + "]",
                    std::to_string(id), "a page from 0 to " + std::to_string(batch.num_pages - 1));
      break;
    }
  }
  if (check.ok() && batch.batch_size > 0) {
    check.require(batch.cu_seqlens_q[batch.batch_size] == tokens,
                  at("cu_seqlens_q", batch.batch_size),
                  std::to_string(batch.cu_seqlens_q[batch.batch_size]),
                  std::to_string(tokens) + ", the sum of query_lens");
    check.require(extent == Extent::kWindow || tokens <= batch.num_tokens, "the sum of query_lens",
                  std::to_string(tokens),
                  "at most num_tokens (" + std::to_string(batch.num_tokens) + ")");
  }
  return check.status();
}

// That batch_id_per_token names the same owners as cu_seqlens_q, -1 for none.
inline Status check_owners(const char* op, const Batch& batch) {
  Check check(op);
  int request = 0;
  for (int token = 0; token < batch.num_tokens; ++token) {
    while (request < batch.batch_size && token >= batch.cu_seqlens_q[request + 1]) ++request;
    const int owner = request < batch.batch_size ? request : -1;
    if (batch.batch_id_per_token[token] == owner) continue;
    check.require(false, at("batch_id_per_token", token),
                  std::to_string(batch.batch_id_per_token[token]),
                  std::to_string(owner) + " by cu_seqlens_q");
    break;
  }
  return check.status();
}

// What every op that walks rows does first: everything checked, and the settings of this call read.
template <typename Params>
Status prepare_rows(const char* op, const Params& params, Settings& settings,
                    Extent extent = Extent::kStep) {
  if (Status status = validate(params); !status.ok()) return status;
  if (Status status = read_settings(op, settings); !status.ok()) return status;
  if (Status status = check_values(op, params.batch, extent); !status.ok()) return status;
  return check_owners(op, params.batch);
}

// Consecutive query tokens of one request.
struct Tile {
  int request;
  int first_token;
  int num_tokens;
};

inline std::vector<Tile> cut_into_tiles(const Batch& batch, int tile_tokens) {
  std::vector<Tile> tiles;
  for (int b = 0; b < batch.batch_size; ++b) {
    // A window need not hold all rows of a request.
    const int end = std::min(batch.num_tokens, batch.cu_seqlens_q[b] + batch.query_lens[b]);
    for (int first = std::max(0, batch.cu_seqlens_q[b]); first < end; first += tile_tokens) {
      tiles.push_back({b, first, std::min(tile_tokens, end - first)});
    }
  }
  return tiles;
}

// Zeroed fp32 scratch on a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t n) : numbers_(new (std::align_val_t{64}) float[n]()) {}
  float* get() const { return numbers_.get(); }

 private:
  struct Delete {
    void operator()(float* numbers) const { operator delete[](numbers, std::align_val_t{64}); }
  };
  std::unique_ptr<float[], Delete> numbers_;
};

}  // namespace minicpm41::cpu
