// What one launch of the logit kernels needs, the same for CPU and CUDA. Plain data: no templates, no torch.
#pragma once

#include <cstdint>

#include "names.h"

namespace fastdistil {

enum class DType : int { f32, bf16, f16, f64 };
constexpr int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Columns of the per-row statistics that the forward leaves for the backward.
enum LogitStat : int {
  kMax,        // largest teacher logit
  kInvSum,     // 1 / sum of exp((teacher - max) / T_t)
  kShift,      // the constant taken off the rows' differences: of logits where the temperatures agree; else that of
               // the scores of this student's and kShiftTeacher's logit
  kLogRatio,   // D = lse(a) - lse(b) - kReference, after the shift; infinite where the rows lie far apart
  kCentre,     // sum of p * (slope - anchor), rules/pair.h (direct rules: 1 where csrc/cpu keeps weights, else 0)
  kReference,  // a - b, after the shift, where the teacher is largest
  kOwnMax,     // the student's log p = (logit - kOwnMax) / T_s - kOwnLog
  kOwnLog,
  kTopStudent,  // the student's largest logit, for centred rules (else 0); of a given difference, that in its column
  kTopTeacher,  // and the teacher's in that column
  kShiftTeacher,
  kStats
};

// What a forward does. Where a vocabulary is split, each part's statistics are merged in between by whoever holds them.
//   statistics  of these columns alone: kMax may be -inf (no teacher mass here)
//   value       from statistics that are given: shares of loss and centre, and of the gradient for direct rules
#define FD_PHASES(X) X(all) X(statistics) X(value)
FD_NAMED_ENUM(Phase, FD_PHASES)

#define FD_DIVERGENCES(X) X(forward_kl) X(reverse_kl) X(jsd) X(skew_kl) X(skew_reverse_kl) X(tvd) X(mse)
FD_NAMED_ENUM(Divergence, FD_DIVERGENCES)  // the rules are in divergence.h

struct LogitArgs {
  const void* student;    // (N, V), row stride student_stride
  const void* teacher;    // (N, V), row stride teacher_stride
  const void* row_scale;  // (N,) float32, float64 for float64 logits; rows of scale 0 are not read
  const void* dloss;      // (N,) as row_scale: what the backward multiplies by, or null (forward: 1)
  bool keep_unit;         // backward: gradient holds what a dloss of 1 gives; only the other rows are touched
  void* loss;             // (N,) as row_scale, or null (backward)
  void* stats;            // (N, kStats) as row_scale: written by the forward, read by the backward
  void* gradient;         // (N, V) in the logits' dtype, row stride gradient_stride, or null (forward alone)
  int64_t rows, columns;  // N, V
  int64_t student_stride, teacher_stride, gradient_stride;  // in elements
  DType dtype;
  bool difference;  // student holds the student's logits less the teacher's; both sides have one temperature
  Phase phase;      // of a forward
  int divergence;   // enum Divergence
  double beta;
  double student_temperature, teacher_temperature;
  double value_factor;  // T_s T_t or 1
};

// The cross entropy with labels that a forward adds to loss and gradient (CPU alone); both null where there is none.
struct LabelArgs {
  const void* labels;       // (N,) int64, a column where label_scale is not 0
  const void* label_scale;  // (N,) as row_scale; where it is 0, nothing is added
};

}  // namespace fastdistil
