// What one launch of the row moments needs. Plain data: no templates, no torch.
#pragma once

#include "logit_args.h"

namespace fastdistil {

// Columns of a row's moments, of tempered logits a = z_s / T_s and b = z_t / T_t.
enum RowMoment : int {
  kStudentMax,
  kStudentOthers,  // A - 1, A = sum of exp(a - max): without the first largest column, 1 itself
  kStudentFirst,   // sum of exp(a - max) (a - max)
  kTeacherMax,
  kTeacherOthers,
  kTeacherFirst,
  kCross,       // sum of exp(b - max b) (a - max a)
  kStudentTop,  // the first column that holds the maximum
  kTeacherTop,
  kMoments
};

struct RowMomentsArgs {
  const void* student;    // (N, V), row stride student_stride
  const void* teacher;    // (N, V), row stride teacher_stride
  const void* row_scale;  // (N,) float32, float64 for float64 logits; rows of scale 0 are not read, their moments 0
  void* moments;          // (N, kMoments) as row_scale
  int64_t rows, columns;  // N, V
  int64_t student_stride, teacher_stride;  // in elements
  DType dtype;                             // of the logits
  double student_temperature, teacher_temperature;
};

}  // namespace fastdistil
