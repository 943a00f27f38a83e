// What one launch of the hidden-state kernels needs. Plain data: no templates, no torch.
#pragma once

#include "logit_args.h"

namespace fastdistil {

#define FD_HIDDEN_KINDS(X) X(mse) X(cosine)
FD_NAMED_ENUM(HiddenKind, FD_HIDDEN_KINDS)

struct HiddenArgs {
  const void* student;                     // (N, D), row stride student_stride
  const void* teacher;                     // (N, D), row stride teacher_stride
  const void* bias;                        // (D,) in the accumulator's dtype, added to the student, or null
  const void* row_scale;                   // (N,) in the accumulator's dtype; rows of scale 0 are not read
  void* loss;                              // (N,) as row_scale: row_scale times the row's value
  void* gradient;                          // (N, D) dense, of sum(loss) in the student, or null
  int64_t rows, columns;                   // N, D
  int64_t student_stride, teacher_stride;  // in elements
  DType student_dtype, teacher_dtype, gradient_dtype;
  DType accumulator;  // f32 or f64
  HiddenKind kind;
};

}  // namespace fastdistil
