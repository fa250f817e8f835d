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

inline int tile_rows(const LowBitWeight& weight) {
  return (weight.out_features + kTileRows - 1) / kTileRows;
}
inline int tile_columns(const LowBitWeight& weight) {
  return (weight.in_features + kTileColumns - 1) / kTileColumns;
}
inline int tile_bytes(const LowBitWeight& weight) {
  return kTileRows * kTileColumns / 8 * weight.bits;
}

inline void check_weight(Check& check, const LowBitWeight& weight) {
  check
      .require(weight.bits == 2 || weight.bits == 4 || weight.bits == 8, "bits",
               std::to_string(weight.bits), "2, 4 or 8")
      .at_least("out_features", weight.out_features, 1)
      .at_least("in_features", weight.in_features, 1);
  if (!check.ok()) return;
  constexpr int kSmallGroup = 64, kLargeGroup = 128;
  const bool is_row = weight.bits == 8 && weight.group == weight.in_features;
  const auto divides = [&](int size) { return weight.in_features % size == 0; };
  check
      .require(divides(kSmallGroup), "in_features", std::to_string(weight.in_features),
               "a multiple of 64")
      .require(weight.group == kSmallGroup || weight.group == kLargeGroup || is_row, "group",
               std::to_string(weight.group),
               weight.bits == 8 ? "64, 128 or in_features" : "64 or 128")
      .require(weight.zero == 1 << weight.bits || (weight.bits == 2 && (weight.zero | 1) == 3),
               "zero", std::to_string(weight.zero),
               weight.bits == 2 ? "2 or 3" : std::to_string(1 << weight.bits))
      .require(
          weight.hadamard == 0 || weight.hadamard == kSmallGroup || weight.hadamard == kLargeGroup,
          "hadamard", std::to_string(weight.hadamard), "0, 64 or 128");
  if (!check.ok()) return;
  check
      .require(divides(weight.group), "in_features", std::to_string(weight.in_features),
               "a multiple of group (" + std::to_string(weight.group) + ")")
      .require(weight.hadamard == 0 || divides(weight.hadamard), "in_features",
               std::to_string(weight.in_features),
               "a multiple of hadamard (" + std::to_string(weight.hadamard) + ")")
      .pointer("qweight", weight.qweight)
      .pointer("scales", weight.scales);
}

inline Status validate(const LowBitLinearParams& params) {
  Check check("low_bit_linear");
  check_weight(check, params.weight);
  check.at_least("num_tokens", params.num_tokens, 0)
      .require(params.dtype >= kFloat32 && params.dtype <= kBFloat16, "dtype",
               std::to_string(params.dtype), "0 (float32), 1 (float16) or 2 (bfloat16)");
  if (params.num_tokens > 0) check.pointer("x", params.x).pointer("out", params.out);
  return check.status();
}

inline Status validate(const ExpandLowBitWeightParams& params) {
  Check check("expand_low_bit_weight");
  check_weight(check, params.weight);
  check
      .require(params.dtype >= kFloat32 && params.dtype <= kFloat8E4M3, "dtype",
               std::to_string(params.dtype),
               "0 (float32), 1 (float16), 2 (bfloat16), 3 (int8) or 4 (float8_e4m3)")
      .at_least("first_row", params.first_row, 0)
      .at_least("num_rows", params.num_rows, 0)
      .require(params.first_row % kTileRows == 0, "first_row", std::to_string(params.first_row),
               "a multiple of " + std::to_string(kTileRows))
      .require(int64_t{params.first_row} + params.num_rows <= params.weight.out_features,
               "first_row + num_rows", std::to_string(int64_t{params.first_row} + params.num_rows),
               "at most out_features (" + std::to_string(params.weight.out_features) + ")");
  if (params.dtype == kInt8 || params.dtype == kFloat8E4M3) {
    // The activations would have to be transformed before they are rounded to 8 bits.
    check.require(params.weight.hadamard == 0, "hadamard", std::to_string(params.weight.hadamard),
                  "0 for rows of 8-bit numbers");
    check.pointer("channel_scales", params.channel_scales);
  }
  if (params.num_rows > 0) check.pointer("out", params.out);
  return check.status();
}

inline Status check_workspace(const char* op, const void* workspace, int64_t got, int64_t wanted) {
  Check check(op);
  check.at_least("workspace_bytes", got, wanted);
  if (wanted > 0) check.pointer("workspace", workspace);
  return check.status();
}

}  // namespace minicpm41
