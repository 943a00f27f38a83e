// kernels/cuda/hopper.h for the emulation: bulk copies that land early or late, their barriers, clusters.
#pragma once

#include <cuda_runtime.h>

namespace fastdistil {
namespace hopper {

struct Barrier {
  int32_t bytes;  // still to come
  bool armed, parity;
};

inline void init(Barrier* barrier) { *barrier = {0, false, false}; }

inline void settle(Barrier* barrier) {
  if (barrier->armed && barrier->bytes == 0) barrier->armed = false, barrier->parity = !barrier->parity;
}

inline void expect(Barrier* barrier, uint32_t bytes) {
  if (barrier->armed) throw std::logic_error("a barrier is armed again before its phase has ended");
  barrier->bytes += static_cast<int32_t>(bytes), barrier->armed = true;
  settle(barrier);
}

inline void copy(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    throw std::logic_error("a bulk copy is not aligned to 16 bytes");
  if (!cuda_host::self->block->owns(to, bytes)) throw std::logic_error("a bulk copy leaves the block's shared memory");
  std::memset(to, cuda_host::kPoison, bytes);  // from now on nobody may read what was there
  cuda_host::self->cluster->copy_later([=] {
    std::memcpy(to, from, bytes);
    barrier->bytes -= static_cast<int32_t>(bytes);
    settle(barrier);
  });
}

inline void wait(Barrier* barrier, uint32_t parity) {
  while (barrier->parity == (parity != 0)) cuda_host::self->cluster->wait_for_news();
}

inline uint32_t cluster_rank() { return cuda_host::self->block->rank; }
inline uint32_t cluster_size() { return cuda_host::shape.cluster; }
inline void cluster_sync() { cuda_host::self->cluster->sync_cluster(); }

template <class T>
T* peer(T* own, uint32_t rank) {
  return reinterpret_cast<T*>(cuda_host::self->block->in_peer(own, cuda_host::self->cluster->block(rank)));
}

}  // namespace hopper
}  // namespace fastdistil
