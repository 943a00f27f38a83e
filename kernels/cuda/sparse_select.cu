// The largest changes of a model: a radix select on the bits of |change|, many tensors in one launch.
//
// Floor: 2 histograms and 2 passes of the compaction (count, then write) x 2 x bytes of the model over the read
// bandwidth. The mathematics is csrc/rules/, the same header that the CPU kernel compiles.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "../../csrc/rules/sparse_rule.h"
#include "sparse.h"

namespace fastdistil {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ float to_compute(float x) { return x; }
__device__ double to_compute(double x) { return x; }
__device__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_compute(__half x) { return __half2float(x); }

// ---- changes

__device__ double any(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[i];
    case DType::bf16:
      return to_compute(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::f16:
      return to_compute(static_cast<const __half*>(data)[i]);
    case DType::f64:
      return static_cast<const double*>(data)[i];
  }
  return 0;
}

struct Change {
  const void *after, *before;
  int64_t size;
  DType after_dtype, before_dtype;

  __device__ explicit Change(const int64_t* row)
      : after(reinterpret_cast<const void*>(row[cuda::kAfter])),
        before(reinterpret_cast<const void*>(row[cuda::kBefore])),
        size(row[cuda::kSize]),
        after_dtype(static_cast<DType>(row[cuda::kAfterDType])),
        before_dtype(static_cast<DType>(row[cuda::kBeforeDType])) {}

  template <class E>
  __device__ uint32_t same(int64_t i) const {
    return change_bits(to_compute(static_cast<const E*>(after)[i]), to_compute(static_cast<const E*>(before)[i]));
  }

  __device__ uint32_t bits(int64_t i) const {
    if (after_dtype != before_dtype) {
      const double a = any(after, after_dtype, i), b = any(before, before_dtype, i);
      const bool wide = after_dtype == DType::f64 || before_dtype == DType::f64;
      return wide ? change_bits(a, b) : change_bits(static_cast<float>(a), static_cast<float>(b));
    }
    switch (after_dtype) {  // the same for the whole block
      case DType::f32:
        return same<float>(i);
      case DType::bf16:
        return same<__nv_bfloat16>(i);
      case DType::f16:
        return same<__half>(i);
      default:
        return same<double>(i);
    }
  }
};

// Calls action(chunk, tensor, change, begin, end) for the chunks that are this block's.
template <class Action>
__device__ void for_chunks(const cuda::Work& work, Action&& action) {
  for (int64_t c = blockIdx.x; c < work.count; c += gridDim.x) {
    const int64_t tensor = work.chunks[2 * c], begin = work.chunks[2 * c + 1];
    const Change change(work.table + tensor * cuda::kChangeColumns);
    const int64_t rest = change.size - begin;
    action(c, tensor, change, begin, begin + (rest < cuda::kSelectChunk ? rest : cuda::kSelectChunk));
  }
}

__device__ void add(int64_t* counts, int64_t at, uint64_t n) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counts + at), static_cast<unsigned long long>(n));
}

__global__ void __launch_bounds__(kThreads) sparse_high_kernel(cuda::Work work, int64_t* counts, int32_t* nan) {
  __shared__ uint32_t own[kHighBuckets];
  for (int b = threadIdx.x; b < kHighBuckets; b += kThreads) own[b] = 0;
  __syncthreads();
  for_chunks(work, [&](int64_t, int64_t tensor, const Change& change, int64_t begin, int64_t end) {
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const uint32_t bits = change.bits(i);
      if (bits > kInfinityBits) nan[tensor] = 1;
      atomicAdd(own + (bits >> kLowBits), 1u);
    }
  });
  __syncthreads();
  for (int b = threadIdx.x; b < kHighBuckets; b += kThreads)
    if (own[b]) add(counts, b, own[b]);
}

__global__ void __launch_bounds__(kThreads) sparse_low_kernel(cuda::Work work, int64_t* counts, uint32_t bucket) {
  for_chunks(work, [&](int64_t, int64_t, const Change& change, int64_t begin, int64_t end) {
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const uint32_t bits = change.bits(i);
      if (bits >> kLowBits != bucket) continue;
      // Equal changes of a warp (a tensor that never changed) are added once.
      const unsigned alike = __match_any_sync(__activemask(), bits);
      if (static_cast<int>(threadIdx.x % 32) == __ffs(alike) - 1) add(counts, bits & (kLowBuckets - 1), __popc(alike));
    }
  });
}

// Sum over the block, for every thread.
__device__ int block_sum(int x) {
  __shared__ int part[kWarps];
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += part[w];
  return sum;
}

// How many of the threads before this one have the flag set; `total` is that of the block.
__device__ int block_rank(bool flag, int& total) {
  __shared__ int part[kWarps];
  const unsigned set = __ballot_sync(kAllLanes, flag);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();
  if (lane == 0) part[warp] = __popc(set);
  __syncthreads();
  int before = __popc(set & ((1u << lane) - 1));
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += part[w];
    total += part[w];
  }
  return before;
}

__global__ void __launch_bounds__(kThreads) sparse_count_kernel(cuda::Work work, int64_t* counts, uint32_t threshold) {
  for_chunks(work, [&](int64_t c, int64_t, const Change& change, int64_t begin, int64_t end) {
    int above = 0, ties = 0;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const uint32_t bits = change.bits(i);
      above += bits > threshold;
      ties += bits == threshold;
    }
    above = block_sum(above), ties = block_sum(ties);
    if (threadIdx.x == 0) counts[2 * c] = above, counts[2 * c + 1] = ties;
  });
}

template <class I>
__global__ void __launch_bounds__(kThreads)
    sparse_write_kernel(cuda::Work work, const int64_t* offsets, const int64_t* keep, I* out, uint32_t threshold) {
  for_chunks(work, [&](int64_t c, int64_t, const Change& change, int64_t begin, int64_t end) {
    int64_t at = offsets[c], ties_left = keep[c];
    for (int64_t first = begin; first < end; first += kThreads) {  // all threads stay together for the ranks
      const int64_t i = first + threadIdx.x;
      const uint32_t bits = i < end ? change.bits(i) : 0;
      const bool tie = i < end && bits == threshold;
      int ties = 0, kept = 0;
      const int tie_rank = block_rank(tie, ties);
      const bool chosen = i < end && (bits > threshold || (tie && tie_rank < ties_left));
      const int rank = block_rank(chosen, kept);
      if (chosen) out[at + rank] = static_cast<I>(i);
      at += kept;
      ties_left -= ties;
    }
  });
}

int blocks_for(const cuda::Work& work, int64_t most) { return static_cast<int>(work.count < most ? work.count : most); }

void check(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": launch failed: " + cudaGetErrorString(error));
}

// Blocks that share a histogram in shared memory over several chunks: 8 a multiprocessor of the largest GPU.
constexpr int64_t kHistogramBlocks = 1184;
constexpr int64_t kMostBlocks = 1 << 30;

}  // namespace

void cuda::sparse_histogram(const Work& work, int64_t* counts, int32_t* nan, int64_t bucket, void* stream) {
  if (work.count == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  if (bucket == kAllBuckets)
    sparse_high_kernel<<<blocks_for(work, kHistogramBlocks), kThreads, 0, s>>>(work, counts, nan);
  else
    sparse_low_kernel<<<blocks_for(work, kMostBlocks), kThreads, 0, s>>>(work, counts, static_cast<uint32_t>(bucket));
  check("sparse_histogram");
}

void cuda::sparse_count(const Work& work, int64_t* counts, uint32_t threshold, void* stream) {
  if (work.count == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  sparse_count_kernel<<<blocks_for(work, kMostBlocks), kThreads, 0, s>>>(work, counts, threshold);
  check("sparse_count");
}

void cuda::sparse_write(const Work& work, const int64_t* offsets, const int64_t* keep, void* out, bool wide,
                        uint32_t threshold, void* stream) {
  if (work.count == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const int blocks = blocks_for(work, kMostBlocks);
  if (wide)
    sparse_write_kernel<<<blocks, kThreads, 0, s>>>(work, offsets, keep, static_cast<int64_t*>(out), threshold);
  else
    sparse_write_kernel<<<blocks, kThreads, 0, s>>>(work, offsets, keep, static_cast<int32_t*>(out), threshold);
  check("sparse_write");
}

}  // namespace fastdistil
