// What one launch of the acceptance kernel needs. Plain data: no templates, no torch.
#pragma once

#include "logit_args.h"

namespace fastdistil {

// What log p and log q of a row are measured from: log p = (z_s - kStudentLevel) / T_s - kStudentLog.
enum AcceptanceLevel : int {
  kStudentLevel,  // the student's largest logit
  kStudentLog,    // ln of the sum of exp((z_s - kStudentLevel) / T_s)
  kTeacherLevel,
  kTeacherLog,
  kLevels
};

struct AcceptanceArgs {
  const void* student;    // (N, V), row stride student_stride
  const void* teacher;    // (N, V), row stride teacher_stride
  const void* row_scale;  // (N,) float32, float64 for float64 logits; rows of scale 0 are not read, their result is 0
  const void* levels;     // (N, kLevels) as row_scale
  void* log_acceptance;   // (N,) as row_scale
  int64_t rows, columns;  // N, V
  int64_t student_stride, teacher_stride;  // in elements
  DType dtype;                             // of the logits
  double student_temperature, teacher_temperature;
};

}  // namespace fastdistil
