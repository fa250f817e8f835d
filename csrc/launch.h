// The functions a caller may launch, the same names on each side. Every function checks what the
// host can know (shapes, dtype, geometry) before it touches memory, and says what it wanted and
// what it got.
#pragma once

#include <string>

#include "params.h"

namespace minicpm41 {

// Empty message: success. Otherwise one line: op, field, wanted, got.
struct Status {
  std::string message;
  bool ok() const { return message.empty(); }
};

namespace cpu {
// `stream` is not used: the work is done when the function returns.
Status run_rope_and_write_kv(const RopeAndWriteKvParams& params, void* stream);
Status run_compress_keys(const CompressKeysParams& params, void* stream);
Status run_select_blocks(const SelectBlocksParams& params, void* stream);
Status run_sparse_attention(const SparseAttentionParams& params, void* stream);
Status run_low_bit_linear(const LowBitLinearParams& params, void* stream);
Status run_expand_low_bit_weight(const ExpandLowBitWeightParams& params, void* stream);
}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t. Never synchronises, never allocates, may be captured in a CUDA graph.
Status run_rope_and_write_kv(const RopeAndWriteKvParams& params, void* stream);
Status run_compress_keys(const CompressKeysParams& params, void* stream);
Status run_select_blocks(const SelectBlocksParams& params, void* stream);
Status run_sparse_attention(const SparseAttentionParams& params, void* stream);
// May read codes and scales before the launch before it has ended: that one must not write them.
Status run_low_bit_linear(const LowBitLinearParams& params, void* stream);
Status run_expand_low_bit_weight(const ExpandLowBitWeightParams& params, void* stream);

// Bytes of scratch the launch needs for these shapes; depends on shapes alone, never on lengths.
int64_t select_blocks_workspace(const SelectBlocksParams& params);
int64_t sparse_attention_workspace(const SparseAttentionParams& params);
int64_t low_bit_linear_workspace(const LowBitLinearParams& params);
}  // namespace cuda

}  // namespace minicpm41
