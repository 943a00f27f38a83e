// What one launch of the cross entropy needs. Plain data: no templates, no torch.
#pragma once

#include "logit_args.h"

namespace fastdistil {

struct CrossEntropyArgs {
  const void* logits;     // (N, V), row stride logits_stride
  const void* labels;     // (N,) int64, a column where row_scale is not 0
  const void* row_scale;  // (N,); rows of scale 0 are not read
  const void* whole;      // (N, 2) dense, of rows with columns elsewhere, or null: see cross_entropy.cpp
  void* loss;             // (N,): row_scale times the row's value is added
  void* gradient;         // (N, V), row stride gradient_stride: its gradient is added; or null
  int64_t rows, columns;  // N, V
  int64_t logits_stride, gradient_stride;  // in elements
  DType dtype;                             // of everything but the labels: f32 or f64
};

}  // namespace fastdistil
