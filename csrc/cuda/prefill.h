// Which kernels serve a request. One that brings kPrefillTokens new tokens or more to a step is
// served by the prefill kernels, tiles of neighbouring tokens at a time, a shorter one row by row
// by the decode kernels. The rule looks at the request alone, so that the bits of a row never
// depend on the rest of the batch.
#pragma once

#include "common.cuh"
#include "paged_kv.cuh"

namespace minicpm41 {
namespace cuda {

constexpr int kPrefillTokens = 16;

__host__ __device__ inline bool is_prefill(int query_len) { return query_len >= kPrefillTokens; }

// The rows of a decode launch: the tokens of the step, or, of a step that is mostly prompts, the
// first tokens of each request, as many as a request may have that is not a prefill.
struct DecodeRows {
  int count;
  bool by_request;
  explicit DecodeRows(const Batch& batch) {
    const int64_t slots = int64_t{batch.batch_size} * (kPrefillTokens - 1);
    by_request = is_prefill(batch.max_query_len) && slots < batch.num_tokens;
    count = by_request ? static_cast<int>(slots) : batch.num_tokens;
  }
};

// The token of a row; -1: none that a decode kernel serves.
__device__ __forceinline__ int token_of_row(const Batch& batch, int row, bool by_request) {
  if (!by_request) return row;
  const int request = row / (kPrefillTokens - 1);
  const int offset = row % (kPrefillTokens - 1);
  const int query_len = __ldg(batch.query_lens + request);
  const int token = __ldg(batch.cu_seqlens_q + request) + offset;
  const bool is_here = token >= 0 && token < batch.num_tokens;
  return offset < query_len && !is_prefill(query_len) && is_here ? token : -1;
}

// A block without a row has nothing to wait for. But each launch ends after the one before it,
// since the prefill kernels behind a launch by request wait for that one alone: a single block sees
// to it, and the others make room.
__device__ __forceinline__ void wait_without_row(bool by_request) {
  if (!by_request || blockIdx.x + blockIdx.y == 0) wait_for_previous_launch();
}

// The two halves of an op. `params` are valid and `device` is the current one; the prefill half is
// launched when max_query_len allows for a prefill request. They run one after the other and use
// the same workspace.
int64_t sparse_decode_workspace(const SparseAttentionParams& params, const Device& device);
int64_t sparse_prefill_workspace(const SparseAttentionParams& params, const Device& device);
Status select_blocks_decode(const SelectBlocksParams& params, const Device& device, void* stream);
Status select_blocks_prefill(const SelectBlocksParams& params, const Device& device, void* stream);
Status sparse_decode(const SparseAttentionParams& params, const Device& device, void* stream);
Status sparse_prefill(const SparseAttentionParams& params, const Device& device, void* stream);
// For any step; the same bits as the kernel for few tokens.
Status compress_keys_prefill(const CompressKeysParams& params, void* stream);

}  // namespace cuda
}  // namespace minicpm41
