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

// Up to this |d| (and |r|, and |D|) one expm1 serves both sides: beyond, q may underflow where p does not.
constexpr double kNear = 20;

template <class T>
struct Mass {
  T sum, difference;
};

// A column's share of S = sum e^(b-m) and of X = sum e^(b-m) expm1(d-r) = sum e^(a-m-r) - S, where m and r are b and d
// of the teacher's largest column so far: a confident teacher's D is d there, and only relative to it has digits left.
template <bool kNearBlock, class T>
FD_FUNCTION Mass<T> mass(Scores<T> c, T m, T r) {
  const T weight = math::exp_nonpositive(c.b - m), d = c.d - r;
  if (kNearBlock) return {weight, weight * math::bounded_expm1(d).value};
  // Infinite, not large, beyond: a maximum that is found later would scale it down to what looks like a number.
  const T exponent = (c.a - m) - r, other = exponent > T(math::kExpMax) ? T(INFINITY) : math::exp(exponent);
  return {weight, math::magnitude(d) <= T(1) ? weight * math::expm1(d) : other - weight};
}

// What a column may be measured against: where one side is infinite, nothing.
template <class T>
FD_FUNCTION T usable_reference(T d) {
  return math::magnitude(d) < T(1e6) ? d : T(0);
}

// S and X relative to a maximum that grows on the way. Until a finite teacher logit is seen the unit is 1: the student
// may have mass where the teacher has none.
template <class T, class Accumulator>
struct Masses {
  T max = -INFINITY, reference = 0;
  Accumulator sum = 0, difference = 0;

  FD_FUNCTION T unit() const { return max > T(-INFINITY) ? max : T(0); }

  // To another unit and reference. 0 stays 0, however far away they are.
  FD_FUNCTION void move(T unit, T to) {
    const Accumulator step = static_cast<Accumulator>(this->unit()) - unit;
    const Accumulator turn = static_cast<Accumulator>(reference) - to;
    const Accumulator factor = math::exp(step), other = math::exp(step + turn);
    const Accumulator turned = math::magnitude(turn) <= Accumulator(1) ? factor * math::expm1(turn) : other - factor;
    difference = (difference == Accumulator(0) ? Accumulator(0) : difference * other) +
                 (sum == Accumulator(0) ? Accumulator(0) : sum * turned);
    sum = sum == Accumulator(0) ? Accumulator(0) : sum * factor;
  }

  // d: at the column of x.
  FD_FUNCTION T raise(T x, T d) {
    if (x > max) {
      const T to = usable_reference(d);
      if (sum != Accumulator(0) || difference != Accumulator(0)) move(x, to);
      max = x, reference = to;
    }
    return unit();
  }
};

// D = lse(a) - lse(b) - reference from X / S; false, and infinite, where the rows lie so far apart that the plain
// difference of log p and log q is the better one.
template <class T>
FD_FUNCTION bool exact_log_ratio(double ratio, T& log_ratio) {
  const bool exact = ratio > -0.9 && ratio < 1e3;
  log_ratio = exact ? static_cast<T>(::log1p(ratio)) : T(INFINITY);
  return exact;
}

template <class T>
struct RowStats {
  T max, inv_sum, log_ratio, centre, reference, own_max, own_log;  // entries of LogitStat
};

// Up to kNear of each other everything follows from the teacher's mass; rows with columns beyond need the student's.
template <class T>
FD_FUNCTION bool near_row(RowStats<T> row) {
  return math::magnitude(row.log_ratio) <= T(kNear) && math::magnitude(row.reference) <= T(kNear);
}

template <class T>
FD_FUNCTION void own_from_teacher(RowStats<T>& row, double sum) {
  row.own_max = row.max;
  row.own_log = static_cast<T>(static_cast<double>(row.reference) + row.log_ratio + ::log(sum));
}

// The slope at the teacher's largest column. A centred rule's gradient is the same if all slopes are taken from there;
// else a confident teacher's own would be 1/2 - (1/2 - 1e-8) in the total variation.
template <class Rule, class T>
FD_FUNCTION T anchor(RowStats<T> row, T beta) {
  if (!Rule::centred) return T(0);
  const T delta = math::magnitude(row.log_ratio) <= T(1) ? -row.log_ratio : T(0);
  const T gap = row.inv_sum * math::expm1(delta);
  return Rule::share(Column<T>{row.inv_sum + gap, row.inv_sum, delta, gap, T(0)}, beta).slope;
}

// What a loop over a row's columns needs: the statistics and what follows from them once a row.
template <class T>
struct RowTerms {
  RowStats<T> stats;
  T log_sum, anchor;  // the teacher's ln of sum e^(b - max)
};

template <class Rule, class T>
FD_FUNCTION RowTerms<T> row_terms(RowStats<T> stats, T beta) {
  const T log_sum = -static_cast<T>(::log(static_cast<double>(stats.inv_sum)));
  stats.own_log += T(0) * stats.inv_sum;  // a teacher that is NaN, or nothing at all, stays visible on both sides
  return {stats, log_sum, anchor<Rule>(stats, beta)};
}

template <bool kNearBlock, class T>
FD_FUNCTION Column<T> column(Scores<T> c, RowTerms<T> terms) {
  const RowStats<T> row = terms.stats;
  const T log_weight = c.b - row.max, q = math::exp_nonpositive(log_weight) * row.inv_sum;
  const T near = (c.d - row.reference) - row.log_ratio;
  if (kNearBlock) {
    const math::Expm1<T> e = math::bounded_expm1(near);
    const T gap = q * e.value;
    return {q + gap, q, near, gap, q * e.excess};
  }
  const bool is_near = math::magnitude(near) <= T(1);
  const bool absent = c.b == T(-INFINITY) && c.d == T(0);  // on both sides
  const T log_p = (c.a - row.own_max) - row.own_log;
  const T delta = is_near ? near : absent ? T(0) : log_p - (log_weight - terms.log_sum);
  const T difference = q * math::expm1(is_near ? near : T(0)), own = math::exp(log_p);
  const T gap = is_near ? difference : own - q, p = is_near ? q + difference : own;
  return {p, q, delta, gap, math::excess(q, gap, delta)};
}

template <class Rule, bool kNearBlock, class T>
FD_FUNCTION Column<T> rule_column(Scores<T> c, RowTerms<T> row) {
  if (Rule::softmax) return column<kNearBlock>(c, row);
  return {T(0), row.stats.inv_sum, c.d, T(0), T(0)};
}

template <class T>
struct Result {
  T value, centre, gradient;  // shares of the row's value and centre; the gradient in the tempered student logit
};

template <class Rule, bool kNearBlock, class T>
FD_FUNCTION Result<T> result(Scores<T> scores, RowTerms<T> row, T beta) {
  const Column<T> c = rule_column<Rule, kNearBlock>(scores, row);
  const Share<T> share = Rule::share(c, beta);
  if (!Rule::centred) return {share.value, T(0), share.slope};
  const T slope = share.slope - row.anchor;
  return {share.value, c.p * slope, c.p * (slope - row.stats.centre)};
}

}  // namespace FD_ISA
}  // namespace fastdistil
