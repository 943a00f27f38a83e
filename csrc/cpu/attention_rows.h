// One query row of two attention maps: its value, and the gradient in the student's scores (docs/losses.md, section 4).
//
// b: the teacher's scores, c: student minus teacher, over the keys that the row sees. With the teacher's weights
// w = e^(b - max), S = sum w and c' = c - (sum w c) / S, the student's probabilities relative to the teacher's are
// p - q = w / S (g - r) / (1 + r), g = e^c' - 1, r = (sum w g) / S: no logarithm, and nothing cancels as c' goes to 0.
// Taking the mean off makes r non-negative (Jensen) and KL(q || p) = log1p((sum w (g - c')) / S), whose terms all are.
#pragma once

#include "../rules/math.h"

namespace fastdistil {
inline namespace FD_ISA {

// Beyond this spread of c, e^c' has lost the weights of a row: there the plain softmaxes are the better ones.
constexpr double kLargestSpread = 40;

// A key with more of the teacher's probability than this is its row's sharp one: no other comes near it. prob_mse takes
// its slopes p - q relative to the one there, which the gradient does not see: else slope minus mean would cancel.
constexpr double kSharp = 0.75;

template <class T>
struct AttentionRow {
  T* b;  // becomes the gradient in the student's scores, times `factor`
  T* c;  // overwritten
  int64_t keys;
  T factor;
};

template <class T>
struct Spread {
  T largest_b, width;  // width: of c
  bool near;
};

template <class T>
inline T squares(const T* x, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

// What the rows' rules must know first; with kSubtract c still holds the student's scores a, and becomes a - b.
template <bool kSubtract, class T>
inline Spread<T> spread(AttentionRow<T> row) {
  T largest = -INFINITY, low = INFINITY, high = -INFINITY;
  int odd = 0;
#pragma omp simd reduction(max : largest, high) reduction(min : low) reduction(| : odd)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T b = row.b[i], c = kSubtract ? row.c[i] - b : row.c[i];
    if (kSubtract) row.c[i] = c;
    largest = b > largest ? b : largest;
    low = c < low ? c : low;
    high = c > high ? c : high;
    odd |= !(math::magnitude(c) < T(1e30));  // NaN, infinite
  }
  return {largest, high - low, !odd && high - low <= T(kLargestSpread)};
}

template <class T>
struct Weights {
  T inv_sum, ratio, excess;  // 1 / S, r, sum of w (g - c')
};

// w in place of b, g in place of c.
template <class T>
inline Weights<T> weigh(AttentionRow<T> row, T largest) {
  T sum = 0, first = 0;
#pragma omp simd reduction(+ : sum, first)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T w = math::exp_nonpositive(row.b[i] - largest);
    row.b[i] = w;
    sum += w;
    first += w * row.c[i];
  }
  const T inv_sum = T(1) / sum, mean = first * inv_sum;
  T grown = 0, excess = 0;
#pragma omp simd reduction(+ : grown, excess)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T w = row.b[i];
    const math::Expm1<T> e = math::bounded_expm1(row.c[i] - mean);
    row.c[i] = e.value;
    grown += w * e.value;
    excess += w * e.excess;
  }
  return {inv_sum, grown * inv_sum, excess};
}

// What prob_mse does with a row's p and slopes, once they stand in b and c.
template <class T>
inline void square_gradient(AttentionRow<T> row, T centre) {
  const T factor = 2 * row.factor;
#pragma omp simd
  for (int64_t i = 0; i < row.keys; ++i) row.b[i] *= (row.c[i] - centre) * factor;
}

// g at the one key that has nearly all of the teacher's probability, whose weight is 1; r where there is none.
template <class T>
inline T sharp_growth(AttentionRow<T> row, Weights<T> weights) {
  if (!(weights.inv_sum > T(kSharp))) return weights.ratio;
  int64_t at = 0;
  while (at + 1 < row.keys && row.b[at] != T(1)) ++at;
  return row.c[at];
}

template <class T>
inline T near_prob_mse(AttentionRow<T> row, T largest) {
  const Weights<T> weights = weigh(row, largest);
  const T by = weights.inv_sum / (T(1) + weights.ratio), ratio = weights.ratio, inv_sum = weights.inv_sum;
  const T anchor = sharp_growth(row, weights) - ratio;
  T value = 0, centre = 0;
#pragma omp simd reduction(+ : value, centre)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T w = row.b[i], growth = row.c[i] - ratio, gap = w * growth * by, p = w * inv_sum + gap;
    const T slope = (w * growth - anchor) * by;  // 0 at the sharp key, even where it is one multiply-add
    row.b[i] = p;
    row.c[i] = slope;
    value += gap * gap;
    centre += p * slope;
  }
  square_gradient(row, centre);
  return value;
}

template <class T>
inline T near_prob_kl(AttentionRow<T> row, T largest) {
  const Weights<T> weights = weigh(row, largest);
  const T by = weights.inv_sum / (T(1) + weights.ratio) * row.factor, ratio = weights.ratio;
#pragma omp simd
  for (int64_t i = 0; i < row.keys; ++i) row.b[i] *= by * (row.c[i] - ratio);
  return math::log1p(weights.excess * weights.inv_sum);
}

// b: the difference of the scores. On its own, because GCC 12 drops the simd where it inlines this loop.
template <class T>
__attribute__((noinline)) T score_mse(AttentionRow<T> row) {
  const T factor = 2 * row.factor;
  T value = 0;
#pragma omp simd reduction(+ : value)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T difference = row.b[i];
    row.b[i] = factor * difference;
    value += difference * difference;
  }
  return value;
}

template <class T>
struct Softmax {
  T largest, log_sum;
};

template <class T>
inline Softmax<T> softmax(const T* scores, int64_t n) {
  T largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = scores[i] > largest ? scores[i] : largest;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += math::exp_nonpositive(scores[i] - largest);
  return {largest, static_cast<T>(std::log(sum))};
}

// A row whose c spreads too far: p - q is the plain difference, from the student's own scores a. NaN stays NaN.
template <bool kSquare, class T>
inline T far_row(AttentionRow<T> row, const T* a) {
  const Softmax<T> student = softmax(a, row.keys), teacher = softmax(row.b, row.keys);
  T value = 0, centre = 0;
#pragma omp simd reduction(+ : value, centre)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T log_p = (a[i] - student.largest) - student.log_sum;
    const T log_q = (row.b[i] - teacher.largest) - teacher.log_sum;
    const T p = math::exp(log_p), q = math::exp(log_q), gap = p - q;
    value += kSquare ? gap * gap : math::excess(q, gap, log_p - log_q);
    centre += p * gap;
    row.b[i] = kSquare ? p : gap * row.factor;
    row.c[i] = gap;
  }
  if (kSquare) square_gradient(row, centre);
  return value;
}

}  // namespace FD_ISA
}  // namespace fastdistil
