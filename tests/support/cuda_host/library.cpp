// The CUDA kernels, compiled for the host, as plain C functions for ctypes. Each returns null, or what went wrong.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../kernels/cuda/launch.h"
#include "../../kernels/cuda/sparse.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace fastdistil;

namespace {

template <class Call>
const char* guarded(Call&& call) {
  static thread_local std::string message;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

EXPORT void settings(int order, unsigned seed, int capability, int active_clusters) {
  cuda_host::settings.order = static_cast<cuda_host::Order>(order), cuda_host::settings.seed = seed;
  cuda_host::settings.capability = capability, cuda_host::settings.active_clusters = active_clusters;
}
EXPORT void use_cluster(int blocks) { cuda::use_cluster(blocks); }
EXPORT int64_t clusters_seen() { return cuda_host::settings.clusters_seen; }

EXPORT const char* logit(const LogitArgs* args) {
  return guarded([&] { cuda::logit(*args, nullptr); });
}
EXPORT const char* sparse_histogram(const cuda::Work* work, int64_t* counts, int32_t* nan, int64_t bucket) {
  return guarded([&] { cuda::sparse_histogram(*work, counts, nan, bucket, nullptr); });
}
EXPORT const char* sparse_count(const cuda::Work* work, int64_t* counts, uint32_t threshold) {
  return guarded([&] { cuda::sparse_count(*work, counts, threshold, nullptr); });
}
EXPORT const char* sparse_write(const cuda::Work* work, const int64_t* offsets, const int64_t* keep, void* out,
                                bool wide, uint32_t threshold) {
  return guarded([&] { cuda::sparse_write(*work, offsets, keep, out, wide, threshold, nullptr); });
}
EXPORT const char* sparse_update(const cuda::Work* work, const double* constants) {
  return guarded([&] { cuda::sparse_update(*work, constants, nullptr); });
}
EXPORT int64_t select_chunk() { return cuda::kSelectChunk; }
EXPORT int64_t update_chunk() { return cuda::kUpdateChunk; }
EXPORT uint16_t to_bf16(float x) { return __float2bfloat16_rn(x).raw; }
EXPORT uint16_t to_f16(float x) { return __float2half_rn(x).raw; }
EXPORT float from_f16(uint16_t x) { return __half2float({x}); }
