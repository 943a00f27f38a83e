// A column of two rows of logits, and the two softmaxes' exact difference (docs/losses.md, section 1).
#pragma once

#include "divergence.h"

namespace fastdistil {
inline namespace FD_ISA {

// How logits become scores: a = z_s / T_s - shift (or (z_s - shift) / T when the temperatures agree), b = z_t / T_t.
template <class T>
struct Tempering {
  T inv_student, inv_teacher;
  bool equal;
  T shift;
};

template <class T>
struct Scores {
  T a, b, d;  // student, teacher, a - b
};

// With equal temperatures subtract first: floating point subtracts exactly what is close.
template <class T>
FD_FUNCTION Scores<T> scores(T student, T teacher, Tempering<T> t) {
  const T s = t.equal ? student - t.shift : student * t.inv_student - t.shift;
  const T u = t.equal ? teacher : teacher * t.inv_teacher;
  const T d = s == u ? T(0) : s - u;  // also where both are -inf
  return t.equal ? Scores<T>{s * t.inv_student, u * t.inv_student, d * t.inv_student} : Scores<T>{s, u, d};
}

// The multiple of 1/1024 nearest to the first columns' difference. KL does not see a constant offset between student
// and teacher, but it would cost the exactness of their difference; this much of it comes off without rounding.
template <class T>
FD_FUNCTION T row_shift(T student, T teacher, Tempering<T> t) {
  const T offset = t.equal ? student - teacher : student * t.inv_student - teacher * t.inv_teacher;
  if (!(math::magnitude(offset) < T(1e6))) return T(0);
  return nearbyint(offset * T(1024)) / T(1024);
}

// Up to this |d| one expm1 serves both sides: beyond, q may underflow where p does not.
constexpr double kNear = 20;

template <class T>
struct Mass {
  T sum, difference;
};

// A column's share of S = sum e^(b-m) and of X = sum e^(b-m) expm1(d) = sum e^(a-m) - S.
template <bool kNearBlock, class T>
FD_FUNCTION Mass<T> mass(Scores<T> c, T m) {
  const T weight = math::exp_nonpositive(c.b - m);
  if (kNearBlock) return {weight, weight * math::bounded_expm1(c.d).value};
  // Infinite, not large, beyond: a maximum that is found later would scale it down to what looks like a number.
  const T other = c.a - m > T(math::kExpMax) ? T(INFINITY) : math::exp(c.a - m);
  return {weight, math::magnitude(c.d) <= T(1) ? weight * math::expm1(c.d) : other - weight};
}

// S and X relative to a maximum that grows on the way. Until a finite teacher logit is seen the unit is 1: the student
// may have mass where the teacher has none.
template <class T, class Accumulator>
struct Masses {
  T max = -INFINITY;
  Accumulator sum = 0, difference = 0;

  FD_FUNCTION T unit() const { return max > T(-INFINITY) ? max : T(0); }

  FD_FUNCTION T raise(T x) {
    if (x > max) {
      if (sum != Accumulator(0) || difference != Accumulator(0)) {
        const Accumulator factor = math::exp(static_cast<Accumulator>(unit() - x));
        sum = max > T(-INFINITY) ? sum * factor : Accumulator(0);
        difference = difference == Accumulator(0) ? Accumulator(0) : difference * factor;  // not 0 * inf
      }
      max = x;
    }
    return unit();
  }
};

// D = lse(a) - lse(b) from X / S; false where the rows lie so far apart that the plain difference must do.
template <class T>
FD_FUNCTION bool exact_log_ratio(double ratio, T& log_ratio) {
  if (!(ratio > -0.9 && ratio < 1e30)) return false;
  log_ratio = static_cast<T>(::log1p(ratio));
  return true;
}

template <class T>
struct RowStats {
  T max, inv_sum, log_ratio, centre;  // entries of LogitStat
};

template <bool kNearBlock, class T>
FD_FUNCTION Column<T> column(Scores<T> c, RowStats<T> row) {
  const T q = math::exp_nonpositive(c.b - row.max) * row.inv_sum;
  const T delta = c.d - row.log_ratio;
  if (kNearBlock) {
    const math::Expm1<T> e = math::bounded_expm1(delta);
    const T gap = q * e.value;
    return {q + gap, q, delta, gap, q * e.excess};
  }
  const T p = math::exp((c.a - row.max) - row.log_ratio) * row.inv_sum;
  const T gap = math::magnitude(delta) <= T(1) ? q * math::expm1(delta) : p - q;
  return {p, q, delta, gap, math::excess(q, gap, delta)};
}

template <class Rule, bool kNearBlock, class T>
FD_FUNCTION Column<T> rule_column(Scores<T> c, RowStats<T> row) {
  if (Rule::softmax) return column<kNearBlock>(c, row);
  return {T(0), row.inv_sum, c.d, T(0), T(0)};
}

template <class T>
struct Result {
  T value, centre, gradient;  // shares of the row's value and centre; the gradient in the tempered student logit
};

template <class Rule, bool kNearBlock, class T>
FD_FUNCTION Result<T> result(Scores<T> scores, RowStats<T> row, T beta) {
  const Column<T> c = rule_column<Rule, kNearBlock>(scores, row);
  const Share<T> share = Rule::share(c, beta);
  if (!Rule::centred) return {share.value, T(0), share.slope};
  return {share.value, c.p * share.slope, c.p * (share.slope - row.centre)};
}

}  // namespace FD_ISA
}  // namespace fastdistil
