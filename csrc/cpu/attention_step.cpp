// The step as a whole on the CPU: the three ops in turn.
#include "validate.h"

namespace minicpm41 {
namespace cpu {

Status run_attention_step(const AttentionStepParams& params, void* stream) {
  Status status = validate(params);
  if (status.ok()) status = run_compress_keys(params.compress, stream);
  if (status.ok()) status = run_select_blocks(params.select, stream);
  if (status.ok()) status = run_sparse_attention(params.attend, stream);
  return status;
}

}  // namespace cpu
}  // namespace minicpm41
