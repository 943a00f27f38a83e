// Maxima, masses and first moments of two rows of logits, from which entropies, cross entropy and agreement follow.
//
// Bytes: each row is read once from memory for the maxima and again, from the L2 cache, for the sums; nothing of its
// size is written. FLOPs: two exponentials a column.
#include "../rules/row_moments_args.h"

#include "elements.h"
#include "log_sum.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

template <class T>
struct Top {
  T max = -INFINITY;
  int64_t begin = 0;  // of the first block that holds it

  void add(const T* x, int64_t at, int n) {
    const T largest = block_max(x, n);
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

// One side of a row: its largest logit and the first column that holds it, and the inverse of the temperature.
template <class T>
struct Side {
  T max;
  int64_t column;
  T inv;

  T centred(T z) const { return (z - max) * inv; }
  // The column among those of a block that begins there; -1 where it is another's.
  int within(int64_t begin, int n) const {
    return column >= begin && column < begin + n ? static_cast<int>(column - begin) : -1;
  }
};

// Adds a block's columns [from, to) to the sums; with kTop, at_s and at_t are its largest columns, or -1.
template <bool kTop, class T>
void add(double* sums, const Side<T>& s, const Side<T>& t, const T* zs, const T* zt, int from, int to, int at_s,
         int at_t) {
  T others_s = 0, first_s = 0, others_t = 0, first_t = 0, cross = 0;
#pragma omp simd reduction(+ : others_s, first_s, others_t, first_t, cross)
  for (int i = from; i < to; ++i) {
    const T a = s.centred(zs[i]), b = t.centred(zt[i]);
    const T p = math::exp_nonpositive(a), q = math::exp_nonpositive(b);
    others_s += kTop && i == at_s ? p - T(1) : p;
    others_t += kTop && i == at_t ? q - T(1) : q;
    first_s += moment(p, a), first_t += moment(q, b), cross += moment(q, a);
  }
  sums[kStudentOthers] += others_s, sums[kStudentFirst] += first_s, sums[kTeacherOthers] += others_t;
  sums[kTeacherFirst] += first_t, sums[kCross] += cross;
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
  auto side = [&](const Top<T>& top, const E* logits, double temperature) {
    return Side<T>{top.max > T(-INFINITY) ? top.max : T(0), column_of(top, logits, args.columns),
                   static_cast<T>(1.0 / temperature)};
  };
  const Side<T> own = side(top_s, student, args.student_temperature);
  const Side<T> other = side(top_t, teacher, args.teacher_temperature);
  double sums[kMoments] = {};
  for_blocks([&](const T* zs, const T* zt, int64_t begin, int n) {
    const int at_s = own.within(begin, n), at_t = other.within(begin, n);
    for (int from = 0; from < n; from += kSummed) {
      const int to = std::min(n, from + kSummed);
      if (at_s < 0 && at_t < 0)
        add<false>(sums, own, other, zs, zt, from, to, at_s, at_t);
      else
        add<true>(sums, own, other, zs, zt, from, to, at_s, at_t);
    }
  });
  for (int i = 0; i < kMoments; ++i) out[i] = static_cast<T>(sums[i]);
  out[kStudentMax] = top_s.max * own.inv, out[kTeacherMax] = top_t.max * other.inv;
  out[kStudentTop] = static_cast<T>(own.column), out[kTeacherTop] = static_cast<T>(other.column);
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
