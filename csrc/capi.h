// The functions of launch.h with C linkage: for the Paddle binding, which is built by another
// compiler run than this library, and for ctypes, so that tests and benchmarks run on any tensor
// library.
//
// Every launch returns 0, or 1 with one line in minicpm41_last_error() of the same thread. The
// functions of the CUDA side are always there; a library built without CUDA answers them with an
// error.
#pragma once

#include "params.h"

#define MINICPM41_EXPORT extern "C" __attribute__((visibility("default")))

#define MINICPM41_DECLARE_OP(op, Params)                                              \
  MINICPM41_EXPORT int minicpm41_##op##_cpu(const minicpm41::Params*);                \
  MINICPM41_EXPORT int minicpm41_##op##_cuda(const minicpm41::Params*, void* stream); \
  MINICPM41_EXPORT int64_t minicpm41_sizeof_##op();

MINICPM41_DECLARE_OP(rope_and_write_kv, RopeAndWriteKvParams)
MINICPM41_DECLARE_OP(compress_keys, CompressKeysParams)
MINICPM41_DECLARE_OP(select_blocks, SelectBlocksParams)
MINICPM41_DECLARE_OP(sparse_attention, SparseAttentionParams)
MINICPM41_DECLARE_OP(low_bit_linear, LowBitLinearParams)
MINICPM41_DECLARE_OP(expand_low_bit_weight, ExpandLowBitWeightParams)
#undef MINICPM41_DECLARE_OP

// Bytes of scratch a CUDA launch wants for these shapes; 0 without CUDA.
MINICPM41_EXPORT int64_t
minicpm41_select_blocks_workspace_cuda(const minicpm41::SelectBlocksParams*);
MINICPM41_EXPORT int64_t
minicpm41_sparse_attention_workspace_cuda(const minicpm41::SparseAttentionParams*);
MINICPM41_EXPORT int64_t
minicpm41_low_bit_linear_workspace_cuda(const minicpm41::LowBitLinearParams*);

MINICPM41_EXPORT const char* minicpm41_last_error();
// "version=0.1.0 cuda=90a-real,90-virtual", or "cuda=none".
MINICPM41_EXPORT const char* minicpm41_build_info();
