// CMakeLists.txt compiles this file, and nothing else, for avx512.
#if defined(__AVX512F__)
#include "cpu/block_kernels.inl"

namespace minicpm41::cpu {
const BlockKernels* block_kernels_avx512() {
  static const BlockKernels kernels{"avx512", widen_any, dot, softmax, accumulate, group_score};
  return &kernels;
}
}  // namespace minicpm41::cpu
#else
#include "cpu/block_kernels.h"

namespace minicpm41::cpu {
const BlockKernels* block_kernels_avx512() { return nullptr; }
}  // namespace minicpm41::cpu
#endif
