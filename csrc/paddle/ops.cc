// The ops as Paddle sees them: check, fill the params struct by name, launch. The table is at the
// bottom.
//
// qkv is FastDeploy's fused activation [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]:
// the kernels read q, k and v inside it by stride. The five tensors of a step come in the order of
// Batch.
#include <string>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "paddle/phi/api/ext/op_meta_info.h"

namespace minicpm41::binding {
namespace {

using paddle::Tensor;
constexpr auto kInt32 = paddle::DataType::INT32;

int64_t bytes_of(paddle::DataType dtype) { return dtype == paddle::DataType::FLOAT32 ? 4 : 2; }

int32_t dtype_of(paddle::DataType dtype) {
  if (dtype == paddle::DataType::FLOAT32) return kFloat32;
  return dtype == paddle::DataType::FLOAT16 ? kFloat16 : kBFloat16;
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.data()));
}

struct BatchTensors {
  const Tensor& batch_id_per_token;
  const Tensor& cu_seqlens_q;
  const Tensor& query_lens;
  const Tensor& history_lens;
  const Tensor& block_tables;
  int max_query_len;

  Batch check(Checks& checks) const {
    checks.tensor("batch_id_per_token", batch_id_per_token, kInt32, {"num_tokens"});
    checks.tensor("query_lens", query_lens, kInt32, {"batch_size"});
    checks.tensor("history_lens", history_lens, kInt32, {"batch_size"});
    checks.tensor("cu_seqlens_q", cu_seqlens_q, kInt32, {int64_t{checks.size("batch_size")} + 1});
    checks.tensor("block_tables", block_tables, kInt32, {"batch_size", "max_blocks"});
    Batch batch{};
    batch.batch_id_per_token = data_of<const int32_t>(batch_id_per_token);
    batch.cu_seqlens_q = data_of<const int32_t>(cu_seqlens_q);
    batch.query_lens = data_of<const int32_t>(query_lens);
    batch.history_lens = data_of<const int32_t>(history_lens);
    batch.block_tables = data_of<const int32_t>(block_tables);
    batch.num_tokens = checks.size("num_tokens");
    batch.batch_size = checks.size("batch_size");
    batch.max_blocks = checks.size("max_blocks");
    batch.num_pages = checks.size("num_pages");
    batch.max_query_len = max_query_len;
    return batch;
  }
};

// A cache's sizes name the geometry: it is checked before anything that must agree with it.
paddle::DataType check_cache(Checks& checks, const char* name, const Tensor& cache, int slots) {
  const paddle::DataType dtype = checks.storage_dtype(name, cache);
  checks.tensor(name, cache, dtype, {"num_pages", "num_kv_heads", int64_t{slots}, "head_dim"});
  return dtype;
}

Heads check_qkv(Checks& checks, const Tensor& qkv, paddle::DataType dtype) {
  checks.tensor("qkv", qkv, dtype, {"num_tokens", "qkv_width"});
  const int64_t head_dim = checks.size("head_dim"), num_kv_heads = checks.size("num_kv_heads");
  const int64_t width = checks.size("qkv_width");
  const int64_t num_q_heads = head_dim > 0 ? width / head_dim - 2 * num_kv_heads : 0;
  if (num_q_heads <= 0 || width % head_dim != 0) {
    checks.fail("qkv: wanted a width of (num_q_heads + 2 * " + std::to_string(num_kv_heads) +
                ") * " + std::to_string(head_dim) + ", got " + std::to_string(width));
  }
  Heads heads{};
  heads.num_q_heads = static_cast<int32_t>(num_q_heads);
  heads.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  heads.head_dim = static_cast<int32_t>(head_dim);
  heads.dtype = dtype_of(dtype);
  return heads;
}

void rope_and_write_kv(const Tensor& qkv, const Tensor& rotary_embs, const Tensor& k_cache,
                       const Tensor& v_cache, const Tensor& batch_id_per_token,
                       const Tensor& cu_seqlens_q, const Tensor& query_lens,
                       const Tensor& history_lens, const Tensor& block_tables, int max_query_len) {
  Checks checks("rope_and_write_kv");
  const paddle::DataType dtype = check_cache(checks, "k_cache", k_cache, kBlockSize);
  checks.tensor("v_cache", v_cache, dtype,
                {"num_pages", "num_kv_heads", int64_t{kBlockSize}, "head_dim"});
  RopeAndWriteKvParams params{};
  params.heads = check_qkv(checks, qkv, dtype);
  checks.tensor("rotary_embs", rotary_embs, paddle::DataType::FLOAT32,
                {int64_t{2}, int64_t{1}, "max_position", int64_t{1}, "head_dim"});
  params.batch = BatchTensors{batch_id_per_token, cu_seqlens_q, query_lens,
                              history_lens,       block_tables, max_query_len}
                     .check(checks);
  const int64_t head_dim = params.heads.head_dim, width = checks.size("qkv_width");
  params.max_position = checks.size("max_position");
  char* row = data_of<char>(qkv);
  params.q = row;
  params.k = row + params.heads.num_q_heads * head_dim * bytes_of(dtype);
  params.v = row + (width - params.heads.num_kv_heads * head_dim) * bytes_of(dtype);
  params.q_stride = params.k_stride = params.v_stride = width;
  params.cos = data_of<const float>(rotary_embs);
  params.sin = params.cos + params.max_position * head_dim;
  params.k_cache = data_of<void>(k_cache);
  params.v_cache = data_of<void>(v_cache);
  launch(qkv, minicpm41_rope_and_write_kv_cpu, minicpm41_rope_and_write_kv_cuda, params);
}

void compress_keys(const Tensor& k_cache, const Tensor& k1_cache, const Tensor& k2_cache,
                   const Tensor& compress_from, const Tensor& batch_id_per_token,
                   const Tensor& cu_seqlens_q, const Tensor& query_lens, const Tensor& history_lens,
                   const Tensor& block_tables, int max_query_len) {
  Checks checks("compress_keys");
  const paddle::DataType dtype = check_cache(checks, "k_cache", k_cache, kBlockSize);
  checks.tensor("k1_cache", k1_cache, dtype,
                {"num_pages", "num_kv_heads", int64_t{kFineSlots}, "head_dim"});
  checks.tensor("k2_cache", k2_cache, dtype,
                {"num_pages", "num_kv_heads", int64_t{kCoarseSlots}, "head_dim"});
  CompressKeysParams params{};
  params.batch = BatchTensors{batch_id_per_token, cu_seqlens_q, query_lens,
                              history_lens,       block_tables, max_query_len}
                     .check(checks);
  checks.tensor("compress_from", compress_from, kInt32, {"batch_size"});
  params.heads.num_kv_heads = checks.size("num_kv_heads");
  params.heads.num_q_heads = params.heads.num_kv_heads;  // no query takes part
  params.heads.head_dim = checks.size("head_dim");
  params.heads.dtype = dtype_of(dtype);
  params.compress_from = data_of<const int32_t>(compress_from);
  params.k_cache = data_of<const void>(k_cache);
  params.k1_cache = data_of<void>(k1_cache);
  params.k2_cache = data_of<void>(k2_cache);
  launch(k_cache, minicpm41_compress_keys_cpu, minicpm41_compress_keys_cuda, params);
}

std::vector<Tensor> select_blocks(const Tensor& qkv, const Tensor& k1_cache, const Tensor& k2_cache,
                                  const Tensor& batch_id_per_token, const Tensor& cu_seqlens_q,
                                  const Tensor& query_lens, const Tensor& history_lens,
                                  const Tensor& block_tables, int max_query_len,
                                  float softmax_scale, int init_blocks, int local_blocks,
                                  int budget, int dense_len, bool overlap) {
  Checks checks("select_blocks");
  const paddle::DataType dtype = check_cache(checks, "k1_cache", k1_cache, kFineSlots);
  checks.tensor("k2_cache", k2_cache, dtype,
                {"num_pages", "num_kv_heads", int64_t{kCoarseSlots}, "head_dim"});
  SelectBlocksParams params{};
  params.heads = check_qkv(checks, qkv, dtype);
  params.batch = BatchTensors{batch_id_per_token, cu_seqlens_q, query_lens,
                              history_lens,       block_tables, max_query_len}
                     .check(checks);
  if (budget < 1) checks.fail("budget: wanted at least 1, got " + std::to_string(budget));
  Tensor topk_idx = paddle::experimental::empty(
      {params.heads.num_kv_heads, params.batch.num_tokens, budget}, kInt32, qkv.place());
  params.q = data_of<const void>(qkv);
  params.q_stride = checks.size("qkv_width");
  params.k1_cache = data_of<const void>(k1_cache);
  params.k2_cache = data_of<const void>(k2_cache);
  params.topk_idx = data_of<int32_t>(topk_idx);
  params.softmax_scale = softmax_scale;
  params.init_blocks = init_blocks;
  params.local_blocks = local_blocks;
  params.budget = budget;
  params.dense_len = dense_len;
  params.overlap = overlap;
  const Tensor workspace = with_workspace(qkv, minicpm41_select_blocks_workspace_cuda, params);
  launch(qkv, minicpm41_select_blocks_cpu, minicpm41_select_blocks_cuda, params);
  return {topk_idx};
}

std::vector<Tensor> sparse_attention(const Tensor& qkv, const Tensor& k_cache,
                                     const Tensor& v_cache, const Tensor& topk_idx,
                                     const Tensor& batch_id_per_token, const Tensor& cu_seqlens_q,
                                     const Tensor& query_lens, const Tensor& history_lens,
                                     const Tensor& block_tables, int max_query_len,
                                     float softmax_scale, int dense_len, bool overlap) {
  Checks checks("sparse_attention");
  const paddle::DataType dtype = check_cache(checks, "k_cache", k_cache, kBlockSize);
  checks.tensor("v_cache", v_cache, dtype,
                {"num_pages", "num_kv_heads", int64_t{kBlockSize}, "head_dim"});
  SparseAttentionParams params{};
  params.heads = check_qkv(checks, qkv, dtype);
  params.batch = BatchTensors{batch_id_per_token, cu_seqlens_q, query_lens,
                              history_lens,       block_tables, max_query_len}
                     .check(checks);
  checks.tensor("topk_idx", topk_idx, kInt32, {"num_kv_heads", "num_tokens", "budget"});
  const int64_t out_width = int64_t{params.heads.num_q_heads} * params.heads.head_dim;
  Tensor out =
      paddle::experimental::empty({params.batch.num_tokens, out_width}, dtype, qkv.place());
  params.q = data_of<const void>(qkv);
  params.q_stride = checks.size("qkv_width");
  params.k_cache = data_of<const void>(k_cache);
  params.v_cache = data_of<const void>(v_cache);
  params.topk_idx = data_of<const int32_t>(topk_idx);
  params.out = data_of<void>(out);
  params.out_stride = out_width;
  params.softmax_scale = softmax_scale;
  params.budget = checks.size("budget");
  params.dense_len = dense_len;
  params.overlap = overlap;
  const Tensor workspace = with_workspace(qkv, minicpm41_sparse_attention_workspace_cuda, params);
  launch(qkv, minicpm41_sparse_attention_cpu, minicpm41_sparse_attention_cuda, params);
  return {out};
}

// The sizes of a weight's tiles; the rest of the geometry is checked below capi.h.
LowBitWeight check_weight(Checks& checks, const Tensor& qweight, const Tensor& scales,
                          int64_t out_features, int64_t in_features, int bits, int group, int zero,
                          int hadamard) {
  const auto tiles = [](int64_t size, int tile) { return (size + tile - 1) / tile; };
  if (group < 1) checks.fail("group: wanted at least 1, got " + std::to_string(group));
  checks.tensor("qweight", qweight, paddle::DataType::UINT8,
                {tiles(out_features, kTileRows), tiles(in_features, kTileColumns),
                 int64_t{kTileRows} * kTileColumns / 8 * bits});
  checks.tensor("scales", scales, paddle::DataType::BFLOAT16,
                {tiles(out_features, kTileRows), in_features / group, int64_t{kTileRows}});
  LowBitWeight weight{};
  weight.qweight = data_of<const uint8_t>(qweight);
  weight.scales = data_of<const uint16_t>(scales);
  weight.out_features = static_cast<int32_t>(out_features);
  weight.in_features = static_cast<int32_t>(in_features);
  weight.bits = bits;
  weight.group = group;
  weight.zero = zero;
  weight.hadamard = hadamard;
  return weight;
}

std::vector<Tensor> low_bit_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                                   int out_features, int bits, int group, int zero, int hadamard) {
  Checks checks("low_bit_linear");
  const paddle::DataType dtype = checks.storage_dtype("x", x);
  checks.tensor("x", x, dtype, {"num_tokens", "in_features"});
  LowBitLinearParams params{};
  params.weight = check_weight(checks, qweight, scales, out_features, checks.size("in_features"),
                               bits, group, zero, hadamard);
  params.num_tokens = checks.size("num_tokens");
  params.dtype = dtype_of(dtype);
  Tensor out = paddle::experimental::empty({params.num_tokens, out_features}, dtype, x.place());
  params.x = data_of<const void>(x);
  params.out = data_of<void>(out);
  const Tensor workspace = with_workspace(x, minicpm41_low_bit_linear_workspace_cuda, params);
  launch(x, minicpm41_low_bit_linear_cpu, minicpm41_low_bit_linear_cuda, params);
  return {out};
}

std::vector<Tensor> expand_low_bit_weight(const Tensor& qweight, const Tensor& scales,
                                          const paddle::optional<Tensor>& channel_scales,
                                          int out_features, int in_features, int bits, int group,
                                          int zero, int hadamard, int first_row, int num_rows,
                                          const std::string& dtype) {
  Checks checks("expand_low_bit_weight");
  struct RowType {
    const char* name;
    paddle::DataType dtype;
    int32_t params;
  };
  const RowType types[] = {{"float32", paddle::DataType::FLOAT32, kFloat32},
                           {"float16", paddle::DataType::FLOAT16, kFloat16},
                           {"bfloat16", paddle::DataType::BFLOAT16, kBFloat16},
#ifdef MINICPM41_PADDLE_HAS_FLOAT8
                           {"float8_e4m3fn", paddle::DataType::FLOAT8_E4M3FN, kFloat8E4M3},
#endif
                           {"int8", paddle::DataType::INT8, kInt8}};
  const RowType* type = nullptr;
  for (const RowType& one : types) type = dtype == one.name ? &one : type;
  if (type == nullptr) {
    checks.fail("dtype: wanted float32, float16, bfloat16, int8 or float8_e4m3fn, got " + dtype);
  }
  ExpandLowBitWeightParams params{};
  params.weight =
      check_weight(checks, qweight, scales, out_features, in_features, bits, group, zero, hadamard);
  if (channel_scales) {
    checks.tensor("channel_scales", *channel_scales, paddle::DataType::FLOAT32,
                  {int64_t{out_features}});
    params.channel_scales = data_of<const float>(*channel_scales);
  }
  if (num_rows < 0) checks.fail("num_rows: wanted at least 0, got " + std::to_string(num_rows));
  Tensor rows = paddle::experimental::empty({num_rows, in_features}, type->dtype, qweight.place());
  params.out = data_of<void>(rows);
  params.first_row = first_row;
  params.num_rows = num_rows;
  params.dtype = type->params;
  launch(qweight, minicpm41_expand_low_bit_weight_cpu, minicpm41_expand_low_bit_weight_cuda,
         params);
  return {rows};
}

}  // namespace
}  // namespace minicpm41::binding

PD_BUILD_OP(minicpm41_rope_and_write_kv)
    .Inputs({"qkv", "rotary_embs", "k_cache", "v_cache", "batch_id_per_token", "cu_seqlens_q",
             "query_lens", "history_lens", "block_tables"})
    .Outputs({"qkv_out", "k_cache_out", "v_cache_out"})
    .Attrs({"max_query_len: int"})
    .SetInplaceMap({{"qkv", "qkv_out"}, {"k_cache", "k_cache_out"}, {"v_cache", "v_cache_out"}})
    .SetKernelFn(PD_KERNEL(minicpm41::binding::rope_and_write_kv));

PD_BUILD_OP(minicpm41_compress_keys)
    .Inputs({"k_cache", "k1_cache", "k2_cache", "compress_from", "batch_id_per_token",
             "cu_seqlens_q", "query_lens", "history_lens", "block_tables"})
    .Outputs({"k1_cache_out", "k2_cache_out"})
    .Attrs({"max_query_len: int"})
    .SetInplaceMap({{"k1_cache", "k1_cache_out"}, {"k2_cache", "k2_cache_out"}})
    .SetKernelFn(PD_KERNEL(minicpm41::binding::compress_keys));

PD_BUILD_OP(minicpm41_select_blocks)
    .Inputs({"qkv", "k1_cache", "k2_cache", "batch_id_per_token", "cu_seqlens_q", "query_lens",
             "history_lens", "block_tables"})
    .Outputs({"topk_idx"})
    .Attrs({"max_query_len: int", "softmax_scale: float", "init_blocks: int", "local_blocks: int",
            "budget: int", "dense_len: int", "overlap: bool"})
    .SetKernelFn(PD_KERNEL(minicpm41::binding::select_blocks));

PD_BUILD_OP(minicpm41_sparse_attention)
    .Inputs({"qkv", "k_cache", "v_cache", "topk_idx", "batch_id_per_token", "cu_seqlens_q",
             "query_lens", "history_lens", "block_tables"})
    .Outputs({"out"})
    .Attrs({"max_query_len: int", "softmax_scale: float", "dense_len: int", "overlap: bool"})
    .SetKernelFn(PD_KERNEL(minicpm41::binding::sparse_attention));

PD_BUILD_OP(minicpm41_low_bit_linear)
    .Inputs({"x", "qweight", "scales"})
    .Outputs({"out"})
    .Attrs({"out_features: int", "bits: int", "group: int", "zero: int", "hadamard: int"})
    .SetKernelFn(PD_KERNEL(minicpm41::binding::low_bit_linear));

PD_BUILD_OP(minicpm41_expand_low_bit_weight)
    .Inputs({"qweight", "scales", paddle::Optional("channel_scales")})
    .Outputs({"rows"})
    .Attrs({"out_features: int", "in_features: int", "bits: int", "group: int", "zero: int",
            "hadamard: int", "first_row: int", "num_rows: int", "dtype: std::string"})
    .SetKernelFn(PD_KERNEL(minicpm41::binding::expand_low_bit_weight));
