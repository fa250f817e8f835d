// Barriers in shared memory (mbarrier): a phase ends when `count` threads have arrived and all
// announced bytes have landed. By their shared addresses, or by pointers to them. The copy engine
// and clusters come with sm_90: what belongs to them is empty before.
#pragma once

#include "common.cuh"

namespace minicpm41 {
namespace cuda {

__device__ __forceinline__ void init_barrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void init_barrier(uint64_t* barrier, int count) {
  init_barrier(shared_address(barrier), count);
}
// Makes fresh barriers known to the copy engine and, once they have met, to the cluster.
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
               : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) { arrive(shared_address(barrier)); }
// Arrives once all copies (cp.async) of this thread so far have landed.
__device__ __forceinline__ void arrive_when_copied(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// Arrives and announces bytes that the copy engine or other blocks will bring.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(barrier),
      "r"(bytes)
      : "memory");
#endif
}
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
  arrive_expecting(shared_address(barrier), bytes);
}
// Whether the phase of that parity has ended; from sm_90 on it may wait a while before it answers.
__device__ __forceinline__ bool has_ended(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
#else
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
#endif
  return ended != 0;
}
// Returns when the phase of that parity has ended.
__device__ __forceinline__ void wait_phase(uint32_t barrier, uint32_t parity) {
  while (!has_ended(barrier, parity)) {
  }
}
// The same for sm_90 alone, as a loop that leaves the answer in a predicate.
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

// ---- barriers of some warps of a block, which the hardware numbers ----

// Waits for `threads` threads; other warps of the block do not take part.
__device__ __forceinline__ void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts among those threads without waiting.
__device__ __forceinline__ void arrive_named(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
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
__device__ __forceinline__ void send(uint32_t target, uint32_t barrier, const float4& x) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(target),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
#endif
}

}  // namespace cuda
}  // namespace minicpm41
