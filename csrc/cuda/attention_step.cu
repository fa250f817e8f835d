// select_blocks and sparse_attention: checks, then the decode kernels, then the prefill kernels for
// a step that may need them.
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

}  // namespace cuda
}  // namespace minicpm41
