// What the sparse kernels need, the same for CPU and CUDA. Plain data: no templates, no torch.
#pragma once

#include <cstdint>

#include "logit_args.h"

namespace fastdistil {

// |change| as an unsigned integer orders as the float does: 31 bits, split into the 11 upper and the 20 lower ones.
constexpr int kLowBits = 20;
constexpr int64_t kHighBuckets = int64_t{1} << (31 - kLowBits);
constexpr int64_t kLowBuckets = int64_t{1} << kLowBits;
constexpr int64_t kAllBuckets = -1;  // the first histogram, over the upper bits of everything

// One tensor before and after training, flat.
struct ChangeArgs {
  const void* param;
  const void* base;
  int64_t size;  // elements
  DType param_dtype, base_dtype;
};

// Which of a tensor's elements are kept: those above the threshold, and the first `ties` of those at it.
struct CompactArgs {
  ChangeArgs change;
  uint32_t threshold;  // bits of |change|
  int64_t ties;
  void* out;         // (capacity,) int32, int64 where wide; null: count alone
  int64_t capacity;  // entries
  bool wide;
};

struct Compacted {
  int64_t count, ties;  // entries written, and how many of them are ties; count -1: more than the capacity, or others
                        // than were counted
};

// Columns of the table of one update, a row a tensor, all int64: addresses (0 for what is absent) and sizes.
enum UpdateColumn : int {
  kParam,
  kGradient,
  kIndex,     // (entries,) int32 or int64 flat positions; 0: every element in order
  kExpAvg,    // (entries,) float32, float64 for float64 parameters
  kExpAvgSq,  // as kExpAvg
  kMaster,    // (entries,) float32 copy of a 16-bit parameter's entries, or 0
  kBase,      // (entries,) as kExpAvg: what the L1 pull goes towards, or 0
  kEntries,
  kDType,  // DType of parameter and gradient
  kWide,   // 1: kIndex is int64
  kSize,   // elements of the parameter: a position that is none of them is refused where it is used (CPU)
  kUpdateColumns
};

// Columns of the constants of one update, a row a tensor.
enum UpdateConstant : int {
  kDecay,          // 1 - lr * weight_decay
  kOneMinusBeta1,  //
  kBeta2,          //
  kOneMinusBeta2,  //
  kEps,            //
  kStepSize,       // lr / (1 - beta1^step)
  kInvBias2Sqrt,   // 1 / sqrt(1 - beta2^step)
  kL1,             // the pull towards the base, an entry
  kUpdateConstants
};

}  // namespace fastdistil
