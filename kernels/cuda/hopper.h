// The instructions of sm_90 that C++ has no words for: bulk copies, their barriers, clusters.
#pragma once

#include <cstdint>

namespace fastdistil {
namespace hopper {

using Barrier = uint64_t;  // in shared memory; one thread arrives, with the bytes to wait for

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// By one thread, before the block's next __syncthreads.
__device__ __forceinline__ void init(Barrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Begins a phase, which ends when as many bytes have been copied.
__device__ __forceinline__ void expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Addresses and bytes are multiples of 16.
__device__ __forceinline__ void copy(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Until the phase of this parity has ended: 0 for a barrier's first phase, then 1, 0, ...
__device__ __forceinline__ void wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
  return x;
}

// All threads of the cluster; what they wrote to each other's shared memory is seen behind it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same variable in another block's shared memory.
template <class T>
__device__ __forceinline__ T* peer(T* own, uint32_t rank) {
  T* result;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(result) : "l"(own), "r"(rank));
  return result;
}

}  // namespace hopper
}  // namespace fastdistil
