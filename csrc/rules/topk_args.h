// What one launch of the top-k kernels needs. Plain data: no templates, no torch.
#pragma once

#include "logit_args.h"

namespace fastdistil {

#define FD_TAILS(X) X(bucket) X(renormalize) X(zero)
FD_NAMED_ENUM(Tail, FD_TAILS)

// Columns of the statistics before the K gradients.
enum TopkStat : int {
  kLargest,  // largest student logit outside of the K columns
  kFactor,   // the gradient there is this times e^((z - largest) / T)
  kTopkStats
};

struct TopkArgs {
  const void* student;       // (N, V), row stride student_stride
  const double* values;      // (N, K) dense: log-probabilities; -inf where an entry is not there (forward)
  const int32_t* named;      // (N, K) dense, ascending; V where an entry is not there
  const double* rest;        // (N,) dense, of the teacher's other columns (forward): the logarithm of their mass for
                             // "bucket", their mass for "zero" (rounding may leave it a little below 0)
  const void* row_scale;     // (N,) float32, float64 for float64 logits; rows of scale 0 are not read
  const void* dloss;         // (N,) as row_scale, or null (forward: 1)
  bool keep_unit;            // backward: gradient holds what a dloss of 1 gives; only the other rows are touched
  void* loss;                // (N,) as row_scale, or null (backward)
  double* stats;             // (N, kTopkStats + K) dense: written by the forward, read by the backward
  void* gradient;            // (N, V) in the logits' dtype, row stride gradient_stride, or null (forward alone)
  int64_t rows, columns, k;  // N, V, K
  int64_t student_stride, gradient_stride;  // in elements
  DType dtype;
  int divergence;  // enum Divergence, but mse
  Tail tail;
  double beta, temperature;
  double value_factor;  // T^2 or 1
};

}  // namespace fastdistil
