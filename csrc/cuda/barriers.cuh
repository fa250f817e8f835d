// Barriers in shared memory (mbarrier): a phase ends when `count` threads have arrived and all
// announced bytes have landed. For sm_90 and later; empty before.
#pragma once

#include "common.cuh"

namespace minicpm41 {
namespace cuda {

__device__ __forceinline__ void init_barrier(uint64_t* barrier, int count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
#endif
}
// Makes fresh barriers known to the copy engine and, once they have met, to the cluster.
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}
// Arrives and announces bytes that the copy engine or other blocks will bring.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
// Returns when the phase of that parity has ended.
__device__ __forceinline__ void wait_phase(uint64_t* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// ---- numbers for another block of the cluster, which a barrier of that block counts ----

// The address of the same variable in block `rank`.
__device__ __forceinline__ uint32_t address_in_block(const void* pointer, int rank) {
  uint32_t address = shared_address(pointer);
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(rank));
#endif
  return address;
}
__device__ __forceinline__ void send(uint32_t target, uint32_t barrier, float x) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
          target),
      "f"(x), "r"(barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void send(uint32_t target, uint32_t barrier, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, "
      "[%3];" ::"r"(target),
      "f"(x), "f"(y), "r"(barrier)
      : "memory");
#endif
}

}  // namespace cuda
}  // namespace minicpm41
