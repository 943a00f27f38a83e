// What one launch of the CPU hidden-state kernel needs. Plain data: no templates, no torch.
#pragma once

#include <cstdint>

#include "../rules/logit_args.h"

namespace fastdistil {

struct HiddenArgs {
  const void* student;    // (N, D), row stride student_stride
  const void* teacher;    // (N, D) in the same dtype, row stride teacher_stride
  const void* bias;       // (D,) as row_scale, added to the student, or null
  const void* row_scale;  // (N,) float32, float64 for float64 states; rows of scale 0 are not read
  void* rows;             // (N,) as row_scale
  void* gradient;         // (N, D), row stride gradient_stride, may be the student's memory; or null
  int64_t rows_count, columns;
  int64_t student_stride, teacher_stride, gradient_stride;  // in elements
  DType dtype;
  bool wide_gradient;  // the gradient is as row_scale, not as the states
};

}  // namespace fastdistil
