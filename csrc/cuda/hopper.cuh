// The instructions of sm_90a that the compiler does not generate by itself: matrix products of a
// warpgroup (wgmma), tile copies by the copy engine (TMA), the barriers these complete on, and the
// moving of registers between warpgroups. One sentence a wrapper; the formats are PTX's.
#pragma once

#include <cuda.h>

#include "barriers.cuh"

namespace minicpm41 {
namespace cuda {

// Set where the compiler targets sm_90a itself; PTX for later architectures has none of this.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MINICPM41_HAS_WGMMA 1
#endif

// ---- host ----

// A tensor map over `data`: `sizes` numbers, the innermost dimension first, `strides` bytes between
// neighbours in the others, copied in boxes of `box`.
template <size_t kRank>
Status encode_map(const char* op, CUtensorMapDataType type, const void* data,
                  const cuuint64_t (&sizes)[kRank], const cuuint64_t (&strides)[kRank - 1],
                  const cuuint32_t (&box)[kRank], CUtensorMapSwizzle swizzle, CUtensorMap* map) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    // Looked up, since the driver library is not linked: the package loads where there is none.
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    cudaGetLastError();
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (encode == nullptr) return {std::string(op) + ": the driver has no cuTensorMapEncodeTiled"};
  cuuint32_t steps[kRank];
  std::fill(steps, steps + kRank, 1);
  const CUresult result =
      encode(map, type, kRank, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return {std::string(op) + ": cuTensorMapEncodeTiled refused the data: CUDA driver error " +
          std::to_string(result)};
}

// A tensor map over the pages of a K or V cache: one copy brings the page of one kv head, 64 rows
// of 128 numbers, as two halves of 64 numbers a row, each in the 128-byte swizzle that wgmma reads.
// The half is a third dimension, since a swizzled row is 128 bytes at most.
inline Status encode_page_map(const char* op, const void* cache, int num_pages, int num_kv_heads,
                              int dtype, CUtensorMap* map) {
  constexpr cuuint32_t kHalf = kHeadDim / 2;
  return encode_map(
      op, dtype == kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      cache, {kHalf, cuuint64_t(num_pages) * num_kv_heads * kBlockSize, 2},
      {kRowBytes, kRowBytes / 2}, {kHalf, kBlockSize, 2}, CU_TENSOR_MAP_SWIZZLE_128B, map);
}

// Whether this library holds a kernel of sm_90a for the current device: elsewhere it is compiled to
// nothing, and then has no static shared memory either.
template <typename Kernel>
bool holds_kernel(Kernel kernel) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  cudaGetLastError();  // not sticky: the next launch must not find it
  return error == cudaSuccess && attributes.sharedSizeBytes > 0;
}

#ifdef MINICPM41_HAS_WGMMA

// ---- copies ----

// Starts the copy of one page (encode_page_map) into shared memory; it completes on `barrier`.
__device__ __forceinline__ void copy_page(const CUtensorMap* map, void* target, uint64_t* barrier,
                                          int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %2}], [%4];" ::"r"(shared_address(target)),
      "l"(map), "r"(0), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// The same for a page that is read once a launch: in L2 it makes room before anything else does, so
// that lengths, tables and the code of kernels stay there.
__device__ __forceinline__ void copy_page_once(const CUtensorMap* map, void* target,
                                               uint64_t* barrier, int row) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %2}], [%4], policy;\n"
      "}" ::"r"(shared_address(target)),
      "l"(map), "r"(0), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// Brings bytes to L2, a multiple of 16 of them.
__device__ __forceinline__ void fetch_to_l2(const void* address, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}
// Fetches a tensor map before its first use.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Shows ordinary writes of this thread to wgmma and the copy engine, which look at shared memory
// through another path.
__device__ __forceinline__ void publish_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- registers ----

// A warpgroup that copies gives its registers to those that compute.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products of a warpgroup: started in order, waited for by counting ----

// Orders this warpgroup's register writes before the products that follow.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving the use of a product's registers over a wait: it does not know
// that a product in flight writes them.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// A matrix operand in shared memory: groups of 8 rows of 128 bytes, 128-byte swizzle, groups 1024
// bytes apart, `half_stride` bytes between the two 64-number halves where an operand has both.
// It starts on a multiple of 1024 bytes, within a row moved by multiples of 16 terms. This is the
// low word of its descriptor, in which bytes count as bytes / 16; the high word is always the same.
__device__ __forceinline__ uint32_t operand(uint32_t address, uint32_t half_stride) {
  return (half_stride >> 4) << 16 | (address & 0x3ffff) >> 4;
}
constexpr uint32_t kOperandHigh = 1u << 30 | 1024 >> 4;

#define MINICPM41_D32(d)                                                                          \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define MINICPM41_D64(d)                                                                          \
  MINICPM41_D32(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), \
      "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]),  \
      "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),  \
      "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]),  \
      "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define MINICPM41_N32                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define MINICPM41_N64                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "  \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "  \
  "%56, %57, %58, %59, %60, %61, %62, %63}"

// d (+)= A B for 64 rows, 16 of them a warp, over 16 terms, in fp32. A comes from registers (as in
// mma.m16n8k16) or from shared memory.
#define MINICPM41_PRODUCTS(T, type)                                                               \
  /* 64 columns; the 16 terms of A and of B are contiguous; `adds` false overwrites d. */         \
  template <>                                                                                     \
  __device__ __forceinline__ void product_64x64x16<T>(float (&d)[32], const uint32_t (&a)[4],     \
                                                      uint32_t b, bool adds) {                    \
    asm volatile(                                                                                 \
        "{\n.reg .pred adds;\n.reg .b64 b;\nsetp.ne.b32 adds, %37, 0;\nmov.b64 b, {%36, %38};\n"  \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " MINICPM41_N32             \
        ", {%32, %33, %34, %35}, b, adds, 1, 1, 0;\n}"                                            \
        : MINICPM41_D32(d)                                                                        \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(int{adds}), "n"(kOperandHigh)); \
  }                                                                                               \
  template <>                                                                                     \
  __device__ __forceinline__ void product_64x64x16<T>(float (&d)[32], uint32_t a, uint32_t b,     \
                                                      bool adds) {                                \
    asm volatile(                                                                                 \
        "{\n.reg .pred adds;\n.reg .b64 a, b;\nsetp.ne.b32 adds, %34, 0;\n"                       \
        "mov.b64 a, {%32, %35};\nmov.b64 b, {%33, %35};\n"                                        \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " MINICPM41_N32             \
        ", a, b, adds, 1, 1, 0, 0;\n}"                                                            \
        : MINICPM41_D32(d)                                                                        \
        : "r"(a), "r"(b), "r"(int{adds}), "n"(kOperandHigh));                                     \
  }                                                                                               \
  /* 128 columns, those of B contiguous. */                                                       \
  template <>                                                                                     \
  __device__ __forceinline__ void product_64x128x16<T>(float (&d)[64], const uint32_t (&a)[4],    \
                                                       uint32_t b) {                              \
    asm volatile(                                                                                 \
        "{\n.reg .pred adds;\n.reg .b64 b;\nsetp.ne.b32 adds, 1, 0;\nmov.b64 b, {%68, %69};\n"    \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " MINICPM41_N64            \
        ", {%64, %65, %66, %67}, b, adds, 1, 1, 1;\n}"                                            \
        : MINICPM41_D64(d)                                                                        \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kOperandHigh));                 \
  }
template <typename T>
__device__ void product_64x64x16(float (&d)[32], const uint32_t (&a)[4], uint32_t b, bool adds);
template <typename T>
__device__ void product_64x64x16(float (&d)[32], uint32_t a, uint32_t b, bool adds);
template <typename T>
__device__ void product_64x128x16(float (&d)[64], const uint32_t (&a)[4], uint32_t b);
MINICPM41_PRODUCTS(__half, "f16")
MINICPM41_PRODUCTS(__nv_bfloat16, "bf16")
#undef MINICPM41_PRODUCTS
#undef MINICPM41_D32
#undef MINICPM41_D64
#undef MINICPM41_N32
#undef MINICPM41_N64

#endif  // MINICPM41_HAS_WGMMA

}  // namespace cuda
}  // namespace minicpm41
