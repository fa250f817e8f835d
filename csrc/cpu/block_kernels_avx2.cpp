// CMakeLists.txt compiles this file, and nothing else, for avx2.
#if defined(__AVX2__) && defined(__FMA__)
#include "cpu/block_kernels.inl"

namespace minicpm41::cpu {
const BlockKernels* block_kernels_avx2() {
  static const BlockKernels kernels{"avx2", widen_any, dot, softmax, accumulate, group_score};
  return &kernels;
}
}  // namespace minicpm41::cpu
#else
#include "cpu/block_kernels.h"

namespace minicpm41::cpu {
const BlockKernels* block_kernels_avx2() { return nullptr; }
}  // namespace minicpm41::cpu
#endif
