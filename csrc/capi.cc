#include "capi.h"

#include <exception>
#include <string>

#include "launch.h"

#ifndef MINICPM41_VERSION
#error "define MINICPM41_VERSION, the package's version as a string"
#endif
#ifdef MINICPM41_WITH_CUDA
#ifndef MINICPM41_CUDA_ARCHS
#error "define MINICPM41_CUDA_ARCHS, the compiled architectures as a string such as \"90a\""
#endif
#define MINICPM41_CUDA_INFO MINICPM41_CUDA_ARCHS
#else
#define MINICPM41_CUDA_INFO "none"
#endif

namespace minicpm41 {
namespace {

thread_local std::string last_error;

template <typename Launch>
int report(Launch launch) {
  try {
    last_error = launch().message;
  } catch (const std::exception& error) {
    last_error = error.what();
    if (last_error.empty()) last_error = "unknown error";
  }
  return last_error.empty() ? 0 : 1;
}

#ifndef MINICPM41_WITH_CUDA
Status without_cuda(const char* op) {
  return {
      std::string(op) +
      ": the tensors are on a GPU, but libfd_minicpm41_kernels.so was built without CUDA: build "
      "the package where nvcc is on the PATH"};
}
#endif

}  // namespace
}  // namespace minicpm41

MINICPM41_EXPORT const char* minicpm41_last_error() { return minicpm41::last_error.c_str(); }

MINICPM41_EXPORT const char* minicpm41_build_info() {
  return "version=" MINICPM41_VERSION " cuda=" MINICPM41_CUDA_INFO;
}

#ifdef MINICPM41_WITH_CUDA
#define MINICPM41_CUDA_LAUNCH(op, params, stream) minicpm41::cuda::run_##op(*params, stream)
#define MINICPM41_CUDA_WORKSPACE(op, params) minicpm41::cuda::op##_workspace(*params)
#else
#define MINICPM41_CUDA_LAUNCH(op, params, stream) \
  (static_cast<void>(params), static_cast<void>(stream), minicpm41::without_cuda(#op))
#define MINICPM41_CUDA_WORKSPACE(op, params) (static_cast<void>(params), int64_t{0})
#endif

#define MINICPM41_OP(op, Params)                                                              \
  MINICPM41_EXPORT int minicpm41_##op##_cpu(const minicpm41::Params* params) {                \
    return minicpm41::report([=] { return minicpm41::cpu::run_##op(*params, nullptr); });     \
  }                                                                                           \
  MINICPM41_EXPORT int minicpm41_##op##_cuda(const minicpm41::Params* params, void* stream) { \
    return minicpm41::report([=] { return MINICPM41_CUDA_LAUNCH(op, params, stream); });      \
  }                                                                                           \
  MINICPM41_EXPORT int64_t minicpm41_sizeof_##op() { return sizeof(minicpm41::Params); }

#define MINICPM41_WORKSPACE(op, Params)                                                       \
  MINICPM41_EXPORT int64_t minicpm41_##op##_workspace_cuda(const minicpm41::Params* params) { \
    return MINICPM41_CUDA_WORKSPACE(op, params);                                              \
  }

MINICPM41_OP(rope_and_write_kv, RopeAndWriteKvParams)
MINICPM41_OP(compress_keys, CompressKeysParams)
MINICPM41_OP(select_blocks, SelectBlocksParams)
MINICPM41_OP(sparse_attention, SparseAttentionParams)
MINICPM41_OP(low_bit_linear, LowBitLinearParams)
MINICPM41_OP(expand_low_bit_weight, ExpandLowBitWeightParams)

MINICPM41_WORKSPACE(select_blocks, SelectBlocksParams)
MINICPM41_WORKSPACE(sparse_attention, SparseAttentionParams)
MINICPM41_WORKSPACE(low_bit_linear, LowBitLinearParams)
