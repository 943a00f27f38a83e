// As much of CUDA as fastdistil's kernels use, for a host compiler: kernels run on fibers.h's threads.
#pragma once

#include <atomic>
#include <cmath>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

// The test's build turns `threadIdx` and its like into calls: as macros they would hit members of those names too.
namespace cuda_host {
inline const dim3& threadIdx() { return self->thread; }
inline const dim3& blockIdx() { return self->block->index; }
inline const dim3& blockDim() { return shape.block; }
inline const dim3& gridDim() { return shape.grid; }
}  // namespace cuda_host

// ---- inside kernels

namespace cuda_host {
// ex2.approx as bad as it may be: 2^-22 off, to either side.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return y * (1.0f + (bits * 2654435761u >> 31 ? 0x1p-22f : -0x1p-22f));
}
}  // namespace cuda_host

inline void __syncthreads() { cuda_host::self->cluster->sync_block(); }
inline unsigned __activemask() { return cuda_host::self->cluster->active(); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_host::self->cluster->exchange(mask, 0, [](const cuda_host::Warp&, unsigned) { return uint64_t{0}; });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int offset) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t value = 0;
  std::memcpy(&value, &x, sizeof(T));
  value = cuda_host::self->cluster->exchange(mask, value, [&](const cuda_host::Warp& warp, unsigned lane) {
    return warp.value[lane ^ static_cast<unsigned>(offset)];
  });
  std::memcpy(&x, &value, sizeof(T));
  return x;
}

inline unsigned __ballot_sync(unsigned mask, int set) {
  auto votes = [mask](const cuda_host::Warp& warp, unsigned) {
    uint64_t result = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1 && warp.value[lane]) result |= 1u << lane;
    return result;
  };
  return static_cast<unsigned>(cuda_host::self->cluster->exchange(mask, set != 0, votes));
}

inline unsigned __match_any_sync(unsigned mask, unsigned x) {
  auto alike = [mask](const cuda_host::Warp& warp, unsigned own) {
    uint64_t result = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1 && warp.value[lane] == warp.value[own]) result |= 1u << lane;
    return result;
  };
  return static_cast<unsigned>(cuda_host::self->cluster->exchange(mask, x, alike));
}

template <class T>
T atomicAdd(T* at, T x) {
  return __atomic_fetch_add(at, x, __ATOMIC_RELAXED);
}

// ---- on the host

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_host {

constexpr size_t kSharedByDefault = 48 << 10, kSharedLimit = 232448;  // bytes a block, sm_90
constexpr unsigned kPortableCluster = 8, kMostCluster = 16;           // blocks

inline cudaError_t last_error = cudaSuccess;
inline std::string last_message;
inline std::map<std::pair<const void*, int>, int> attributes;

inline int attribute(const void* kernel, int which, int otherwise) {
  const auto found = attributes.find({kernel, which});
  return found == attributes.end() ? otherwise : found->second;
}

inline cudaError_t error(cudaError_t code, const std::string& message) {
  last_message = message;
  return last_error = code;
}

inline cudaError_t run(const void* kernel, const Shape& asked, const std::function<void()>& body) {
  const int most = attribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedByDefault);
  const bool large = attribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 0);
  if (asked.dynamic_bytes > static_cast<size_t>(most)) return error(cudaErrorInvalidValue, "too much shared memory");
  if (asked.cluster > (large ? kMostCluster : kPortableCluster) || asked.grid.x % asked.cluster || asked.grid.x == 0 ||
      asked.block.x > 1024 || asked.block.x % 32)
    return error(cudaErrorInvalidValue, "a grid, block or cluster of this size cannot be launched");
  if (asked.cluster > 1) ++settings.clusters_seen;
  std::atomic<unsigned> next{0};
  std::mutex mutex;
  auto work = [&] {
    shape = asked;
    for (unsigned first; (first = next.fetch_add(asked.cluster)) < asked.grid.x;) try {
        Cluster(first, body).run();
      } catch (const std::exception& caught) {
        const std::lock_guard lock(mutex);
        error(cudaErrorLaunchFailure, caught.what());
      }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < settings.workers; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  return last_error;
}

// kernel<<<grid, block, bytes, stream>>>(args...), the kernel wrapped in a lambda.
struct Launch {
  dim3 grid, block;
  size_t bytes;
  cudaStream_t stream;

  template <class Kernel, class... A>
  void run(Kernel&& kernel, const A&... args) const {
    cuda_host::run(nullptr, {grid, block, 1, bytes}, [&] { kernel(args...); });
  }
};

}  // namespace cuda_host

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_host::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return cuda_host::last_message.c_str(); }

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = cuda_host::settings.capability, cudaSuccess;
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute which, int value) {
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize && value > static_cast<int>(cuda_host::kSharedLimit))
    return cuda_host::error(cudaErrorInvalidValue, "more shared memory than a block can have");
  cuda_host::attributes[{reinterpret_cast<const void*>(kernel), which}] = value;
  return cudaSuccess;
}

template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(P...), const cudaLaunchConfig_t*) {
  return *clusters = cuda_host::settings.active_clusters, cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... args) {
  cuda_host::Shape shape{config->gridDim, config->blockDim, 1, config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i) shape.cluster = config->attrs[i].val.clusterDim.x;
  return cuda_host::run(reinterpret_cast<const void*>(kernel), shape, [&] { kernel(args...); });
}
