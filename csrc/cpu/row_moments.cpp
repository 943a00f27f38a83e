// Maxima, masses and first moments of two rows of logits, from which entropies, cross entropy and agreement follow.
//
// Bytes: each row is read once from memory for the maxima and again, from the L2 cache, for the sums; nothing of its
// size is written. FLOPs: two exponentials a column.
#include "../rules/row_moments_args.h"

#include "elements.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

constexpr int kBlock = 512;  // columns whose sums stay in the logits' precision

template <class T>
struct Top {
  T max = -INFINITY;
  int64_t begin = 0;  // of the first block that holds it

  void add(const T* x, int64_t at, int n) {
    T largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
    if (largest > max) max = largest, begin = at;
  }
};

template <class E>
int64_t column_of(const Top<Compute<E>>& top, const E* row, int64_t columns) {
  for (int64_t i = top.begin; i < columns; ++i)
    if (to_compute(row[i]) == top.max) return i;
  return 0;  // a row of -inf or NaN
}

// w x, where a weight of 0 counts for nothing however far its logit lies.
template <class T>
T moment(T w, T x) {
  return w == T(0) ? T(0) : w * x;
}

template <class E>
void row(const RowMomentsArgs& args, int64_t r) {
  using T = Compute<E>;
  T* out = static_cast<T*>(args.moments) + r * kMoments;
  for (int i = 0; i < kMoments; ++i) out[i] = T(0);
  if (static_cast<const T*>(args.row_scale)[r] == T(0)) return;
  const E* student = static_cast<const E*>(args.student) + r * args.student_stride;
  const E* teacher = static_cast<const E*>(args.teacher) + r * args.teacher_stride;
  T s[kBlock], t[kBlock];
  auto for_blocks = [&](auto&& action) {
    for (int64_t begin = 0; begin < args.columns; begin += kBlock) {
      const int n = static_cast<int>(args.columns - begin < kBlock ? args.columns - begin : kBlock);
      action(load_block(student + begin, s, n), load_block(teacher + begin, t, n), begin, n);
    }
  };
  Top<T> top_s, top_t;
  for_blocks([&](const T* zs, const T* zt, int64_t begin, int n) { top_s.add(zs, begin, n), top_t.add(zt, begin, n); });
  const T inv_s = static_cast<T>(1.0 / args.student_temperature),
          inv_t = static_cast<T>(1.0 / args.teacher_temperature);
  const T max_s = top_s.max > T(-INFINITY) ? top_s.max : T(0), max_t = top_t.max > T(-INFINITY) ? top_t.max : T(0);
  double sums[kMoments] = {};
  for_blocks([&](const T* zs, const T* zt, int64_t, int n) {
    T sum_s = 0, first_s = 0, sum_t = 0, first_t = 0, cross = 0;
#pragma omp simd reduction(+ : sum_s, first_s, sum_t, first_t, cross)
    for (int i = 0; i < n; ++i) {
      const T a = (zs[i] - max_s) * inv_s, b = (zt[i] - max_t) * inv_t;
      const T p = math::exp_nonpositive(a), q = math::exp_nonpositive(b);
      sum_s += p, sum_t += q;
      first_s += moment(p, a), first_t += moment(q, b), cross += moment(q, a);
    }
    sums[kStudentSum] += sum_s, sums[kStudentFirst] += first_s, sums[kTeacherSum] += sum_t;
    sums[kTeacherFirst] += first_t, sums[kCross] += cross;
  });
  for (int i = 0; i < kMoments; ++i) out[i] = static_cast<T>(sums[i]);
  out[kStudentMax] = top_s.max * inv_s, out[kTeacherMax] = top_t.max * inv_t;
  out[kStudentTop] = static_cast<T>(column_of(top_s, student, args.columns));
  out[kTeacherTop] = static_cast<T>(column_of(top_t, teacher, args.columns));
}

template <class E>
void run(const RowMomentsArgs& args, int threads) {
  if (args.rows * args.columns <= 8 * kBlock) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1 + 8 * kBlock / (args.columns + 1))
  for (int64_t r = 0; r < args.rows; ++r) row<E>(args, r);
}

}  // namespace

void row_moments(const RowMomentsArgs& args, int threads) {
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
