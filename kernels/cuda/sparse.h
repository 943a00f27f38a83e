// The CUDA kernels of sparse updates as the bindings see them. `stream` is a cudaStream_t; all addresses are the
// device's. Each throws std::runtime_error on a launch error.
#pragma once

#include "../../csrc/rules/sparse_args.h"

namespace fastdistil::cuda {

constexpr int64_t kSelectChunk = 1 << 14;  // elements of a tensor that one thread block takes at a time
constexpr int64_t kUpdateChunk = 1 << 11;  // entries

// Columns of the table of one selection, a row a tensor, all int64.
enum ChangeColumn : int { kAfter, kBefore, kSize, kAfterDType, kBeforeDType, kChangeColumns };

struct Work {
  const int64_t* table;   // (tensors, kChangeColumns), for an update (tensors, kUpdateColumns)
  const int64_t* chunks;  // (count, 2): tensor, first element or entry; ascending
  int64_t count;
};

// Adds to counts, (kHighBuckets,) for bucket kAllBuckets, else (kLowBuckets,); sets nan (tensors,) to 1 where one is.
void sparse_histogram(const Work& work, int64_t* counts, int32_t* nan, int64_t bucket, void* stream);

// counts (chunks, 2): changes above the threshold, and at it.
void sparse_count(const Work& work, int64_t* counts, uint32_t threshold, void* stream);

// Writes each chunk's positions above the threshold, and its first keep[chunk] ties, from out[offsets[chunk]] on.
void sparse_write(const Work& work, const int64_t* offsets, const int64_t* keep, void* out, bool wide,
                  uint32_t threshold, void* stream);

// One AdamW step of all tensors in one launch; constants (tensors, kUpdateConstants).
void sparse_update(const Work& work, const double* constants, void* stream);

}  // namespace fastdistil::cuda
