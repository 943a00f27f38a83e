// ln of the sum of min(p, q) over a row's columns, from both sides' logsumexps.
//
// Bytes: each row is read once; in a chunk of logits it comes from the cache. FLOPs: one exponential a column. The sum
// is taken relative to its largest term, so that it has its digits where it is far below the smallest float.
#include "../rules/acceptance_args.h"

#include "elements.h"
#include "log_sum.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

template <class E>
void row(const AcceptanceArgs& args, int64_t r) {
  using T = Compute<E>;
  T& out = static_cast<T*>(args.log_acceptance)[r];
  out = T(0);
  if (static_cast<const T*>(args.row_scale)[r] == T(0)) return;
  const T* levels = static_cast<const T*>(args.levels) + r * kLevels;
  const T level_s = levels[kStudentLevel], log_s = levels[kStudentLog];
  const T level_t = levels[kTeacherLevel], log_t = levels[kTeacherLog];
  const T inv_s = static_cast<T>(1.0 / args.student_temperature),
          inv_t = static_cast<T>(1.0 / args.teacher_temperature);
  const E* student = static_cast<const E*>(args.student) + r * args.student_stride;
  const E* teacher = static_cast<const E*>(args.teacher) + r * args.teacher_stride;
  T s[kBlock], t[kBlock], lower[kBlock];
  LogSum<T> sum;
  for (int64_t begin = 0; begin < args.columns; begin += kBlock) {
    const int n = static_cast<int>(args.columns - begin < kBlock ? args.columns - begin : kBlock);
    const T* zs = load_block(student + begin, s, n);
    const T* zt = load_block(teacher + begin, t, n);
    for (int i = 0; i < n; ++i) {
      const T a = (zs[i] - level_s) * inv_s - log_s, b = (zt[i] - level_t) * inv_t - log_t;
      lower[i] = b < a || b != b ? b : a;  // NaN where either is
    }
    sum.add(lower, n, T(1));
  }
  out = static_cast<T>(sum.max > T(-INFINITY) ? sum.max + sum.log() : sum.log());
}

template <class E>
void run(const AcceptanceArgs& args, int threads) {
  if (args.rows * args.columns <= 8 * kBlock) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1 + 8 * kBlock / (args.columns + 1))
  for (int64_t r = 0; r < args.rows; ++r) row<E>(args, r);
}

}  // namespace

void acceptance(const AcceptanceArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f32:
      return run<float>(args, threads);
    case DType::bf16:
      return run<bf16>(args, threads);
    case DType::f16:
      return run<f16>(args, threads);
    case DType::f64:
      return run<double>(args, threads);
  }
}

}  // namespace FD_ISA
}  // namespace fastdistil
