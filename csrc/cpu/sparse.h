// The CPU kernels of sparse updates as the rest of the extension sees them.
#pragma once

#include "../rules/sparse_args.h"

namespace fastdistil::cpu {

// Adds the tensor's |change| to `counts`: (kHighBuckets,) for bucket kAllBuckets, else (kLowBuckets,) of those whose
// upper bits are `bucket`. True where a change is NaN; counts are void then.
bool sparse_histogram(const ChangeArgs& args, int64_t* counts, int64_t bucket, int threads);

// Writes the ascending positions of what is kept.
Compacted sparse_compact(const CompactArgs& args, int threads);

// One AdamW step of all tensors: table (tensors, kUpdateColumns), constants (tensors, kUpdateConstants). False where a
// position is outside of its tensor: the entries beside it were left as they were.
bool sparse_update(const int64_t* table, const double* constants, int64_t tensors, int threads);

// Bit copies of elements of `itemsize` bytes: out[i] = source[index[i]], and target[index[i]] = values[i]. False where
// a position is outside of the tensor: that entry was left out.
struct MoveArgs {
  void* tensor;  // (size,)
  int64_t size;
  const void* index;
  void* values;  // (entries,)
  int64_t entries;
  int itemsize;  // 2, 4 or 8 bytes
  bool wide;     // the index is int64
};
bool sparse_take(const MoveArgs& args, int threads);
bool sparse_put(const MoveArgs& args, int threads);

}  // namespace fastdistil::cpu
