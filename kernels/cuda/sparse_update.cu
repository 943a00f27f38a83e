// AdamW on some entries of many tensors, in one launch whatever their dtypes.
//
// Floor at a density of 8%: parameters are read and written and gradients read in sectors of 32 bytes, of which every
// second holds an entry, and indices and moments are 20 bytes an entry. The mathematics is csrc/rules/, the same header
// that the CPU kernel compiles.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "../../csrc/rules/sparse_rule.h"
#include "sparse.h"

namespace fastdistil {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 30;

__device__ float to_compute(float x) { return x; }
__device__ double to_compute(double x) { return x; }
__device__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_compute(__half x) { return __half2float(x); }
__device__ void from_compute(float x, float& y) { y = x; }
__device__ void from_compute(double x, double& y) { y = x; }
__device__ void from_compute(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ void from_compute(float x, __half& y) { y = __float2half_rn(x); }

template <class E>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

template <class E>
__device__ void update_entry(const int64_t* row, const AdamW<typename ComputeOf<E>::type>& rule, int64_t entry) {
  using T = typename ComputeOf<E>::type;
  int64_t at = entry;  // without positions: every element in order
  if (row[kIndex])
    at = row[kWide] ? reinterpret_cast<const int64_t*>(row[kIndex])[entry]
                    : reinterpret_cast<const int32_t*>(row[kIndex])[entry];
  E& param = reinterpret_cast<E*>(row[kParam])[at];
  T &m = reinterpret_cast<T*>(row[kExpAvg])[entry], &v = reinterpret_cast<T*>(row[kExpAvgSq])[entry];
  T w = to_compute(param), g = to_compute(reinterpret_cast<const E*>(row[kGradient])[at]);
  T* master = reinterpret_cast<T*>(row[kMaster]);
  if (master) {  // unless someone else has written the parameter since, its master knows it better
    E rounded;
    from_compute(master[entry], rounded);
    if (to_compute(rounded) == w) w = master[entry];
  }
  if (row[kBase]) g += pull(rule.l1, w, reinterpret_cast<const T*>(row[kBase])[entry]);
  T m_new = m, v_new = v;
  adamw(rule, g, w, m_new, v_new);
  m = m_new, v = v_new;
  if (master) master[entry] = w;
  from_compute(w, param);
}

template <class E>
__device__ void update_chunk(const int64_t* row, const double* constants, int64_t begin) {
  const auto rule = AdamW<typename ComputeOf<E>::type>::from(constants);
  const int64_t rest = row[kEntries] - begin;
  const int64_t end = begin + (rest < cuda::kUpdateChunk ? rest : cuda::kUpdateChunk);
#pragma unroll 2
  for (int64_t entry = begin + threadIdx.x; entry < end; entry += kThreads) update_entry<E>(row, rule, entry);
}

__global__ void __launch_bounds__(kThreads) sparse_update_kernel(cuda::Work work, const double* constants) {
  for (int64_t c = blockIdx.x; c < work.count; c += gridDim.x) {
    const int64_t tensor = work.chunks[2 * c], begin = work.chunks[2 * c + 1];
    const int64_t* row = work.table + tensor * kUpdateColumns;
    const double* numbers = constants + tensor * kUpdateConstants;
    switch (static_cast<DType>(row[kDType])) {
      case DType::f32:
        update_chunk<float>(row, numbers, begin);
        break;
      case DType::bf16:
        update_chunk<__nv_bfloat16>(row, numbers, begin);
        break;
      case DType::f16:
        update_chunk<__half>(row, numbers, begin);
        break;
      case DType::f64:
        update_chunk<double>(row, numbers, begin);
        break;
    }
  }
}

}  // namespace

void cuda::sparse_update(const Work& work, const double* constants, void* stream) {
  if (work.count == 0) return;
  const int blocks = static_cast<int>(work.count < kMostBlocks ? work.count : kMostBlocks);
  sparse_update_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(work, constants);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sparse_update: launch failed: ") + cudaGetErrorString(error));
}

}  // namespace fastdistil
