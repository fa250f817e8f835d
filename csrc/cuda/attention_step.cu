// select_blocks and sparse_attention: checks, then the decode kernels, then the prefill kernels for
// a step that may need them. And the step as a whole.
#include "decode_attention.cuh"
#include "prefill.h"

namespace minicpm41 {
namespace cuda {

int64_t select_blocks_workspace(const SelectBlocksParams&) { return 0; }

Status run_select_blocks(const SelectBlocksParams& params, void* stream) {
  Status status = validate(params);
  if (!status.ok()) return status;
  Device device;
  status = check_geometry("select_blocks", params.heads, &device);
  if (!status.ok() || params.batch.num_tokens == 0) return status;
  status = select_blocks_decode(params, device, stream);
  if (status.ok() && is_prefill(params.batch.max_query_len)) {
    status = select_blocks_prefill(params, device, stream);
  }
  return status;
}

int64_t sparse_attention_workspace(const SparseAttentionParams& params) {
  Device device;
  if (!current_device("sparse_attention", &device).ok()) return 0;
  return std::max(sparse_decode_workspace(params, device),
                  sparse_prefill_workspace(params, device));
}

Status run_sparse_attention(const SparseAttentionParams& params, void* stream) {
  const char* op = "sparse_attention";
  Status status = validate(params);
  if (!status.ok()) return status;
  Device device;
  status = check_geometry(op, params.heads, &device);
  if (!status.ok() || params.batch.num_tokens == 0) return status;
  status = check_workspace(op, params.workspace, params.workspace_bytes,
                           sparse_attention_workspace(params));
  if (!status.ok()) return status;
  // The prefill half comes first, for it may begin before select_blocks has ended.
  if (is_prefill(params.batch.max_query_len)) {
    status = sparse_prefill(params, device, stream);
    if (!status.ok()) return status;
  }
  return sparse_decode(params, device, stream);
}

Status run_attention_step(const AttentionStepParams& params, void* stream) {
  const char* op = "attention_step";
  Status status = validate(params);
  if (!status.ok()) return status;
  Device device;
  status = check_geometry(op, params.attend.heads, &device);
  if (!status.ok()) return status;
  const Batch& batch = params.attend.batch;
  const int32_t* from = params.compress.compress_from;
  // Where no request brings two tokens, no row needs a window that another row completes.
  const bool is_decode = batch.num_tokens > 0 && batch.max_query_len == 1 &&
                         (from == nullptr || from == batch.history_lens);
  if (is_decode) {
    bool is_launched = false;
    status = decode_step_sm90(params.select, params.attend, device, stream, &is_launched);
    if (is_launched || !status.ok()) return status;
  }
  status = run_compress_keys(params.compress, stream);
  SelectBlocksParams select = params.select;
  SparseAttentionParams attend = params.attend;
  select.overlap = attend.overlap = 1;
  if (status.ok()) status = run_select_blocks(select, stream);
  if (status.ok()) status = run_sparse_attention(attend, stream);
  return status;
}

}  // namespace cuda
}  // namespace minicpm41
