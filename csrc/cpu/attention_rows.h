// One query row of two attention maps: its value, and the gradient in the student's scores (docs/losses.md, section 4).
//
// b: the teacher's scores, c: student minus teacher, over the keys that the row sees. With the teacher's weights
// w = e^(b - max), S = sum w and c' = c - (sum w c) / S, the student's probabilities relative to the teacher's are
// p - q = w / S (g - r) / (1 + r), g = e^c' - 1, r = (sum w g) / S: no logarithm, and nothing cancels as c' goes to 0.
// Taking the mean off makes r non-negative (Jensen) and KL(q || p) = log1p((sum w (g - c')) / S), whose terms all are.
//
// A constant in b or in c changes none of these, so that either may come without the part that all keys have in common.
#pragma once

#include "../rules/math.h"

namespace fastdistil {
inline namespace FD_ISA {

// Beyond this spread of c, e^c' has lost the weights of a row: there the plain softmaxes are the better ones.
constexpr double kLargestSpread = 40;

// The weight of a key this far below the teacher's largest is below the smallest normal number, and taken for 0, and
// with it the student's, which is e^c' times as much: beyond this spread that could be seen.
template <class T>
constexpr T kLowestWeight = sizeof(T) == 8 ? 708 : 87;
constexpr double kSpreadOfLost = 16;

// In heads this narrow the terms of a query's gradient, a sum over keys, may cancel all at once: then the rounding of
// small probabilities counts, and prob_mse takes those of a student that is further than this from its teacher from its
// own scores, whose digits e^c' does not have.
constexpr int64_t kNarrow = 4;
constexpr double kNarrowSpread = 4;

// A larger difference of scores carries more rounding than the plain difference of two probabilities.
constexpr double kLargestExact = 16;

// A key with more of the student's probability than this is its row's sharp one: no other comes near it. prob_mse takes
// its slopes p - q relative to the one there, which the gradient does not see: else slope minus mean would cancel. That
// slope is minus the sum of all others, and the others' p is their own e^(b + c'): q + (p - q) would cancel where q is
// the larger by far.
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
  T largest = -INFINITY, lowest = INFINITY, low = INFINITY, high = -INFINITY;
  int odd = 0;
#pragma omp simd reduction(max : largest, high) reduction(min : lowest, low) reduction(| : odd)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T b = row.b[i], c = kSubtract ? row.c[i] - b : row.c[i];
    if (kSubtract) row.c[i] = c;
    largest = b > largest ? b : largest;
    lowest = b < lowest ? b : lowest;
    low = c < low ? c : low;
    high = c > high ? c : high;
    odd |= !(math::magnitude(c) < T(1e30));  // NaN, infinite
  }
  const T width = high - low, most = largest - lowest > kLowestWeight<T> ? T(kSpreadOfLost) : T(kLargestSpread);
  return {largest, width, !odd && width <= most};
}

template <class T>
struct Weights {
  T mean, inv_sum, ratio, excess, largest;  // mean of c, 1 / S, r, sum of w (g - c'), largest w e^c'
};

// w in place of b, g = e^c' - 1 in g, which may be c itself.
template <bool kLargest, class T>
inline Weights<T> weigh(AttentionRow<T> row, T* g, T largest_b) {
  T sum = 0, first = 0;
#pragma omp simd reduction(+ : sum, first)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T w = math::exp_nonpositive(row.b[i] - largest_b);
    row.b[i] = w;
    sum += w;
    first += w * row.c[i];
  }
  const T inv_sum = T(1) / sum, mean = first * inv_sum;
  T grown = 0, excess = 0, largest = 0;
#pragma omp simd reduction(+ : grown, excess) reduction(max : largest)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T w = row.b[i];
    const math::Expm1<T> e = math::bounded_expm1(row.c[i] - mean);
    g[i] = e.value;
    grown += w * e.value;
    if (kLargest) {
      const T weight = w + w * e.value;
      largest = weight > largest ? weight : largest;
    } else {
      excess += w * e.excess;
    }
  }
  return {mean, inv_sum, grown * inv_sum, excess, largest};
}

// What prob_mse does with a row's p and slopes, once they stand in b and in `slopes`.
template <class T>
inline void square_gradient(AttentionRow<T> row, const T* slopes, T centre) {
  const T factor = 2 * row.factor;
#pragma omp simd
  for (int64_t i = 0; i < row.keys; ++i) row.b[i] *= (slopes[i] - centre) * factor;
}

// The same where one key has nearly all of p: p stands in b, p - q in gap. Returns the value.
template <class T>
inline T sharp_square(AttentionRow<T> row, T* gap) {
  int64_t at = 0;
  while (at + 1 < row.keys && !(row.b[at] > T(0.5))) ++at;
  const T p = row.b[at];
  row.b[at] = 0, gap[at] = 0;
  T others = 0;
#pragma omp simd reduction(+ : others)
  for (int64_t i = 0; i < row.keys; ++i) others += gap[i];
  T value = others * others, centre = 0;
#pragma omp simd reduction(+ : value, centre)
  for (int64_t i = 0; i < row.keys; ++i) {
    value += gap[i] * gap[i];
    centre += row.b[i] * (gap[i] + others);
  }
  square_gradient(row, gap, centre - others);
  row.b[at] = -2 * row.factor * p * centre;
  return value;
}

// g: room for a row.
template <class T>
inline T near_prob_mse(AttentionRow<T> row, T* g, T largest) {
  const Weights<T> weights = weigh<true>(row, g, largest);
  const T by = weights.inv_sum / (T(1) + weights.ratio), ratio = weights.ratio, inv_sum = weights.inv_sum;
  if (weights.largest * by > T(kSharp)) {
    const T mean = weights.mean;
#pragma omp simd
    for (int64_t i = 0; i < row.keys; ++i) {
      const T w = row.b[i];
      g[i] = w * (g[i] - ratio) * by;
      row.b[i] = w * math::exp(row.c[i] - mean) * by;
    }
    return sharp_square(row, g);
  }
  T value = 0, centre = 0;
#pragma omp simd reduction(+ : value, centre)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T w = row.b[i], gap = w * (g[i] - ratio) * by, p = w * inv_sum + gap;
    row.b[i] = p;
    g[i] = gap;
    value += gap * gap;
    centre += p * gap;
  }
  square_gradient(row, g, centre);
  return value;
}

template <class T>
inline T near_prob_kl(AttentionRow<T> row, T largest) {
  const Weights<T> weights = weigh<false>(row, row.c, largest);
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
  int64_t at;               // of the largest score
  T largest, sum, log_sum;  // relative to it: its own weight is 1
};

template <class T>
inline Softmax<T> softmax(T* scores, int64_t n) {
  int64_t at = 0;
  for (int64_t i = 1; i < n; ++i)
    if (scores[i] > scores[at]) at = i;
  const T largest = scores[at];
  scores[at] = -INFINITY;
  T others = 0;  // by themselves: beside 1 they may be small
#pragma omp simd reduction(+ : others)
  for (int64_t i = 0; i < n; ++i) others += math::exp_nonpositive(scores[i] - largest);
  scores[at] = largest;
  return {at, largest, T(1) + others, math::log1p(others)};
}

// A row whose c spreads too far for e^c': p is the student's own, from its scores a. NaN stays NaN. Keys at which the
// two still agree take p - q from c: relative to c at the teacher's largest key, log(p / q) is c - D with
// D = log1p((sum w (e^c - 1)) / S), unless the student has nearly all of its probability elsewhere.
template <bool kSquare, class T>
inline T far_row(AttentionRow<T> row, T* a) {
  const Softmax<T> student = softmax(a, row.keys), teacher = softmax(row.b, row.keys);
  const T at_top = row.c[teacher.at], reference = math::magnitude(at_top) < T(1e6) ? at_top : T(0);
  T grown = 0;
#pragma omp simd reduction(+ : grown)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T b = row.b[i] - teacher.largest, x = row.c[i] - reference, w = math::exp(b);
    const T near = w * math::bounded_expm1(math::clamp(x, T(-1), T(1))).value, far = math::exp(b + x) - w;
    grown += math::magnitude(x) <= T(1) ? near : far;
  }
  const T ratio = grown / teacher.sum;
  const bool usable = ratio > T(-0.9) && ratio < T(1000);
  const T distance = usable ? math::log1p(ratio) : T(0), limit = usable ? T(1) : T(-1);
  T value = 0, centre = 0;
#pragma omp simd reduction(+ : value, centre)
  for (int64_t i = 0; i < row.keys; ++i) {
    const T log_p = (a[i] - student.largest) - student.log_sum;
    const T log_q = (row.b[i] - teacher.largest) - teacher.log_sum;
    const T p = math::exp(log_p), q = math::exp(log_q), x = row.c[i] - reference, delta = x - distance;
    const bool agrees = math::magnitude(delta) <= limit && math::magnitude(x) <= T(kLargestExact);
    const T near = q * math::bounded_expm1(math::clamp(delta, T(-1), T(1))).value;
    const T gap = agrees ? near : p - q;
    value += kSquare ? gap * gap : math::excess(q, gap, agrees ? delta : log_p - log_q);
    centre += p * gap;
    row.b[i] = p;
    row.c[i] = gap;
  }
  const bool sharp = row.b[student.at] > T(kSharp);
  if (kSquare && sharp) return sharp_square(row, row.c);
  if (kSquare) {
    square_gradient(row, row.c, centre);
    return value;
  }
  if (sharp) {  // 1 minus little, on either side
    T others = 0;
    row.c[student.at] = 0;
#pragma omp simd reduction(+ : others)
    for (int64_t i = 0; i < row.keys; ++i) others += row.c[i];
    row.c[student.at] = -others;
  }
  const T factor = row.factor;
#pragma omp simd
  for (int64_t i = 0; i < row.keys; ++i) row.b[i] = row.c[i] * factor;
  return value;
}

}  // namespace FD_ISA
}  // namespace fastdistil
