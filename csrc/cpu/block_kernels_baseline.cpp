// What every machine of the compiler's target runs.
#include "cpu/block_kernels.inl"

namespace minicpm41::cpu {
const BlockKernels* block_kernels_baseline() {
  static const BlockKernels kernels{"baseline", widen_any, dot, softmax, accumulate, group_score};
  return &kernels;
}
}  // namespace minicpm41::cpu
