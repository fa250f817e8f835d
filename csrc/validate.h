// What both sides must find true of a params struct before they look at it further: everything that
// needs no dereference. The CPU side adds the values (cpu/step.h); a device side adds its own
// geometry.
#pragma once

#include <string>

#include "launch.h"

namespace minicpm41 {

// Keeps the first failure: "op: name is GOT, wanted WANTED".
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  Check& require(bool ok, const std::string& name, const std::string& got,
                 const std::string& wanted) {
    if (!ok && message_.empty()) message_ = op_ + ": " + name + " is " + got + ", wanted " + wanted;
    return *this;
  }
  Check& at_least(const char* name, int64_t got, int64_t minimum) {
    return require(got >= minimum, name, std::to_string(got),
                   "at least " + std::to_string(minimum));
  }
  Check& pointer(const char* name, const void* pointer) {
    return require(pointer != nullptr, name, "null", "an address");
  }
  Status status() const { return {message_}; }
  bool ok() const { return message_.empty(); }

 private:
  std::string op_;
  std::string message_;
};

constexpr int kMaxHeadDim = 256;
constexpr int kHeadDimMultiple = 16;

inline void check_batch(Check& check, const Batch& batch) {
  check.at_least("num_tokens", batch.num_tokens, 0)
      .at_least("batch_size", batch.batch_size, 0)
      .at_least("max_blocks", batch.max_blocks, 1)
      .at_least("num_pages", batch.num_pages, 1)
      .at_least("max_query_len", batch.max_query_len, batch.num_tokens > 0 ? 1 : 0);
  if (batch.num_tokens > 0) {
    check.at_least("batch_size", batch.batch_size, 1)
        .pointer("batch_id_per_token", batch.batch_id_per_token);
  }
  if (batch.batch_size > 0) {
    check.pointer("cu_seqlens_q", batch.cu_seqlens_q)
        .pointer("query_lens", batch.query_lens)
        .pointer("history_lens", batch.history_lens)
        .pointer("block_tables", batch.block_tables);
  }
}

inline void check_heads(Check& check, const Heads& heads) {
  check.require(heads.dtype >= kFloat32 && heads.dtype <= kBFloat16, "dtype",
                std::to_string(heads.dtype), "0 (float32), 1 (float16) or 2 (bfloat16)");
  check.at_least("num_kv_heads", heads.num_kv_heads, 1)
      .at_least("num_q_heads", heads.num_q_heads, 1);
  if (!check.ok()) return;
  check.require(heads.num_q_heads % heads.num_kv_heads == 0, "num_q_heads",
                std::to_string(heads.num_q_heads),
                "a multiple of num_kv_heads (" + std::to_string(heads.num_kv_heads) + ")");
  check.require(heads.head_dim >= kHeadDimMultiple && heads.head_dim <= kMaxHeadDim &&
                    heads.head_dim % kHeadDimMultiple == 0,
                "head_dim", std::to_string(heads.head_dim),
                "a multiple of " + std::to_string(kHeadDimMultiple) + " up to " +
                    std::to_string(kMaxHeadDim));
}

inline int64_t q_row(const Heads& heads) { return int64_t{heads.num_q_heads} * heads.head_dim; }
inline int64_t kv_row(const Heads& heads) { return int64_t{heads.num_kv_heads} * heads.head_dim; }

inline Status validate(const RopeAndWriteKvParams& params) {
  Check check("rope_and_write_kv");
  check_batch(check, params.batch);
  check_heads(check, params.heads);
  check.at_least("max_position", params.max_position, 1);
  if (params.batch.num_tokens > 0) {
    check.at_least("q_stride", params.q_stride, q_row(params.heads))
        .at_least("k_stride", params.k_stride, kv_row(params.heads))
        .at_least("v_stride", params.v_stride, kv_row(params.heads))
        .pointer("q", params.q)
        .pointer("k", params.k)
        .pointer("v", params.v)
        .pointer("cos", params.cos)
        .pointer("sin", params.sin)
        .pointer("k_cache", params.k_cache)
        .pointer("v_cache", params.v_cache);
  }
  return check.status();
}

inline Status validate(const CompressKeysParams& params) {
  Check check("compress_keys");
  check_batch(check, params.batch);
  check_heads(check, params.heads);
  if (params.batch.batch_size > 0) {
    check.pointer("k_cache", params.k_cache)
        .pointer("k1_cache", params.k1_cache)
        .pointer("k2_cache", params.k2_cache);
  }
  return check.status();
}

inline Status validate(const SelectBlocksParams& params) {
  Check check("select_blocks");
  check_batch(check, params.batch);
  check_heads(check, params.heads);
  check.at_least("init_blocks", params.init_blocks, 0)
      .at_least("local_blocks", params.local_blocks, 1)
      .at_least("budget", params.budget, int64_t{params.init_blocks} + params.local_blocks)
      .at_least("dense_len", params.dense_len, -1)
      .require(params.softmax_scale > 0, "softmax_scale", std::to_string(params.softmax_scale),
               "a positive number");
  if (params.batch.num_tokens > 0) {
    check.at_least("q_stride", params.q_stride, q_row(params.heads))
        .pointer("q", params.q)
        .pointer("k1_cache", params.k1_cache)
        .pointer("k2_cache", params.k2_cache)
        .pointer("topk_idx", params.topk_idx);
  }
  return check.status();
}

inline Status validate(const SparseAttentionParams& params) {
  Check check("sparse_attention");
  check_batch(check, params.batch);
  check_heads(check, params.heads);
  check.at_least("budget", params.budget, 1)
      .at_least("dense_len", params.dense_len, -1)
      .require(params.softmax_scale > 0, "softmax_scale", std::to_string(params.softmax_scale),
               "a positive number");
  if (params.batch.num_tokens > 0) {
    check.at_least("q_stride", params.q_stride, q_row(params.heads))
        .at_least("out_stride", params.out_stride, q_row(params.heads))
        .pointer("q", params.q)
        .pointer("k_cache", params.k_cache)
        .pointer("v_cache", params.v_cache)
        .pointer("topk_idx", params.topk_idx)
        .pointer("out", params.out);
  }
  return check.status();
}

inline Status check_workspace(const char* op, const void* workspace, int64_t got, int64_t wanted) {
  Check check(op);
  check.at_least("workspace_bytes", got, wanted);
  if (wanted > 0) check.pointer("workspace", workspace);
  return check.status();
}

}  // namespace minicpm41
