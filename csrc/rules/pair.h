// A column of two rows of logits, and the two softmaxes' exact difference (docs/losses.md, section 1).
#pragma once

#include "divergence.h"

namespace fastdistil {
inline namespace FD_ISA {

// 1 / temperature; high + middle + low is the same with twice the digits.
template <class T>
struct Inverse {
  T whole, high, middle, low;
};

// The upper 12 bits of a float's 24: products of two such numbers are exact.
FD_FUNCTION float upper_bits(float x) { return math::bits<float>(math::bits<uint32_t>(x) & 0xfffff000u); }

template <class T>
FD_FUNCTION Inverse<T> inverse_of(double temperature);

template <>
FD_FUNCTION Inverse<float> inverse_of<float>(double temperature) {
  const double inverse = 1.0 / temperature;
  const float high = upper_bits(static_cast<float>(inverse));
  const float middle = upper_bits(static_cast<float>(inverse - high));
  return {static_cast<float>(inverse), high, middle, static_cast<float>(inverse - high - middle)};
}

template <>
FD_FUNCTION Inverse<double> inverse_of<double>(double temperature) {
  const double inverse = 1.0 / temperature;
  return {inverse, inverse, ::fma(-inverse, temperature, 1.0) / temperature, 0.0};
}

// How logits become differences of scores: a/T_s - b/T_t - shift, or (a - b - shift) / T where the temperatures agree.
template <class T>
struct Tempering {
  Inverse<T> student, teacher;
  bool equal;
  T shift;
};

template <class T>
FD_FUNCTION Tempering<T> tempering_of(double student_temperature, double teacher_temperature) {
  return {inverse_of<T>(student_temperature), inverse_of<T>(teacher_temperature),
          student_temperature == teacher_temperature, T(0)};
}

template <class T>
struct Scores {
  T a, b, d;  // logits of student and teacher as they are; the difference of their scores, tempered and shifted
};

// x = fl(s - t): what the rounding left off.
template <class T>
FD_FUNCTION T difference_error(T s, T t, T x) {
  const T back = x - s;
  return (s - (x - back)) - (t + back);
}

template <class T>
struct Product {
  T value, error;
};

FD_FUNCTION Product<float> product(float z, Inverse<float> inverse) {
  const float high = upper_bits(z), low = z - high;
  return {high * inverse.high,
          (high * inverse.middle + low * inverse.high) + (low * inverse.middle + z * inverse.low)};
}

FD_FUNCTION Product<double> product(double z, Inverse<double> inverse) {
  const double value = z * inverse.high;
  return {value, ::fma(z, inverse.high, -value) + z * inverse.middle};
}

// Which of the three forms below a row needs.
enum class Form { plain, shifted, tempered };

template <class T>
FD_FUNCTION Form form_of(const Tempering<T>& t) {
  return !t.equal ? Form::tempered : t.shift != T(0) ? Form::shifted : Form::plain;
}

// Neither a large constant between the rows nor two temperatures may cost a digit of what is left: the difference has
// the rounding of its own size alone. Where both sides are -inf it is 0.
template <Form kForm, class T>
FD_FUNCTION T score_difference(T s, T t, const Tempering<T>& row) {
  if (kForm == Form::plain) return (s == t ? T(0) : s - t) * row.student.whole;
  const bool absent = s == T(-INFINITY) && t == T(-INFINITY);
  if (kForm == Form::shifted) {
    const T x = s - t, error = difference_error(s, t, x);
    const T d = (x - row.shift) + (error == error ? error : T(0));  // NaN where x is infinite
    return absent ? T(0) : d * row.student.whole;
  }
  const Product<T> a = product(s, row.student), b = product(t, row.teacher);
  const T x = a.value - b.value;
  const T d = (x - row.shift) + (difference_error(a.value, b.value, x) + (a.error - b.error));
  const T plain = s * row.student.whole - t * row.teacher.whole;
  const T rough = plain == plain || s != s || t != t ? plain : T(0);  // both beyond all numbers
  return absent ? T(0) : math::magnitude(d) < T(INFINITY) ? d : rough;
}

template <class T>
FD_FUNCTION Scores<T> scores(T student, T teacher, const Tempering<T>& row) {
  const T d = row.equal ? score_difference<Form::shifted>(student, teacher, row)
                        : score_difference<Form::tempered>(student, teacher, row);
  return {student, teacher, d};
}

// A difference that a row may be shifted by; where one side is infinite, none.
template <class T>
FD_FUNCTION T usable_shift(T d) {
  return math::magnitude(d) < T(1e6) ? d : T(0);
}

// The difference of a column before any shift, in the shift's units.
template <class T>
FD_FUNCTION T column_shift(T student, T teacher, const Tempering<T>& row) {
  const T d = row.equal ? student - teacher : score_difference<Form::tempered>(student, teacher, row);
  return usable_shift(d);
}

// KL does not see a constant between student and teacher, but subtracting it late would cost the difference its digits.
// A first guess from three columns: what two of them agree about, else 0. misplaced() tells whether it was good.
template <class T>
FD_FUNCTION T guessed_shift(T first, T second, T third) {
  const T near = math::magnitude(second) / T(8);
  return math::magnitude(first - second) <= near || math::magnitude(third - second) <= near ? second : T(0);
}

// Up to this |d| (and |r|, and |D|) one expm1 serves both sides: beyond, q may underflow where p does not.
constexpr double kNear = 20;

// What the masses are measured by: the teacher's largest logit so far, the student's there and the difference of scores.
template <class T>
struct Unit {
  T teacher, student, difference;
};

template <class T>
struct Mass {
  T sum, difference;
};

// A column's share of S = sum e^(b-m) and of X = sum e^(b-m) expm1(d-r) = sum e^(a-m-r) - S, where m and r are b and d
// of the teacher's largest column so far: a confident teacher's D is d there, and only relative to it has digits left.
// e^(a-m-r) is e^(a - student's score there), which no offset between the rows touches.
template <bool kNearBlock, class T>
FD_FUNCTION Mass<T> mass(Scores<T> c, Unit<T> unit, T inv_student, T inv_teacher) {
  const T weight = math::exp_nonpositive((c.b - unit.teacher) * inv_teacher), d = c.d - unit.difference;
  if (kNearBlock) return {weight, weight * math::bounded_expm1(d).value};
  // Infinite, not large, beyond: a maximum that is found later would scale it down to what looks like a number.
  const T exponent = (c.a - unit.student) * inv_student;
  const T other = exponent > T(math::kExpMax) ? T(INFINITY) : math::exp(exponent);
  return {weight, math::magnitude(d) <= T(1) ? weight * math::expm1(d) : other - weight};
}

// S and X relative to a maximum that grows on the way. Until a finite teacher logit is seen there is but the student's
// mass, relative to its own largest logit.
template <class T, class Accumulator>
struct Masses {
  T max = -INFINITY, own = -INFINITY, reference = 0;  // of the teacher's largest column: b, a and d
  Accumulator sum = 0, difference = 0;

  FD_FUNCTION Unit<T> unit() const {
    return {max > T(-INFINITY) ? max : T(0), own > T(-INFINITY) ? own : T(0), reference};
  }

  // To another largest column. 0 stays 0, however far away they are.
  FD_FUNCTION void move(T max, T own, T reference, T inv_student, T inv_teacher) {
    const Accumulator turn = static_cast<Accumulator>(this->reference) - reference;
    const Accumulator other = math::exp((static_cast<Accumulator>(this->own) - own) * inv_student);
    const Accumulator factor = math::exp((static_cast<Accumulator>(this->max) - max) * inv_teacher);
    const Accumulator turned = math::magnitude(turn) <= Accumulator(1) ? factor * math::expm1(turn) : other - factor;
    difference = (difference == Accumulator(0) ? Accumulator(0) : difference * other) +
                 (sum == Accumulator(0) ? Accumulator(0) : sum * turned);
    sum = sum == Accumulator(0) ? Accumulator(0) : sum * factor;
    this->max = max, this->own = own, this->reference = reference;
  }

  // A column comes that may be the largest yet.
  FD_FUNCTION void raise(Scores<T> c, const Tempering<T>& row) {
    const T inv_student = row.student.whole, inv_teacher = row.teacher.whole;
    if (c.b > max) {
      const bool usable = math::magnitude(c.d) < T(1e6);  // else d = 0 is what is measured against
      const T level = row.equal ? c.b + row.shift : (c.b * inv_teacher + row.shift) / inv_student;
      move(c.b, usable ? c.a : level, usable ? c.d : T(0), inv_student, inv_teacher);
    } else if (max == T(-INFINITY) && c.a > own) {
      move(max, c.a, T(0), inv_student, inv_teacher);
    }
  }
};

// Whether the row's differences still hold a constant that costs them digits: r is far from 0 and all columns' d are
// near it, as the mean of the others' expm1(d - r) says. Of a teacher that leaves the others no mass one cannot tell.
template <class T, class Accumulator>
FD_FUNCTION bool misplaced(const Masses<T, Accumulator>& masses) {
  const Accumulator r = math::magnitude(masses.reference), others = masses.sum - Accumulator(1);
  if (others < Accumulator(1e-6)) return r > Accumulator(1.0 / 64);
  return r > Accumulator(0) && math::magnitude(masses.difference) <= others * r / Accumulator(32);
}

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
  T max, inv_sum, log_ratio, centre, reference, own_max, own_log, top_student, top_teacher;  // entries of LogitStat
};

// Up to kNear of each other everything follows from the teacher's mass; rows with columns beyond need the student's.
template <class T>
FD_FUNCTION bool near_row(RowStats<T> row) {
  return math::magnitude(row.log_ratio) <= T(kNear) && math::magnitude(row.reference) <= T(kNear);
}

// own: the student's logit where the teacher is largest.
template <class T>
FD_FUNCTION void own_from_teacher(RowStats<T>& row, T own, double sum) {
  row.own_max = own;
  row.own_log = static_cast<T>(static_cast<double>(row.log_ratio) + ::log(sum));
}

// What a loop over a row's columns needs: the statistics and what follows from them once a row.
template <class T>
struct RowTerms {
  RowStats<T> stats;
  T inv_student, inv_teacher;
  T log_sum;  // the teacher's ln of sum e^(b - max)
  Mixture<T> mixture;
  Origin<T> origin;
  bool by_scores;  // turn is d - turn_zero, else delta - turn_zero
  T turn_zero, anchor;  // anchor: the slope at the student's largest column
};

template <bool kNearBlock, class T>
FD_FUNCTION Column<T> column(Scores<T> c, const RowTerms<T>& terms) {
  const RowStats<T>& row = terms.stats;
  const T log_weight = (c.b - row.max) * terms.inv_teacher, q = math::exp_nonpositive(log_weight) * row.inv_sum;
  const T near = (c.d - row.reference) - row.log_ratio;
  if (kNearBlock) {
    const math::Expm1<T> e = math::bounded_expm1(near);
    const T gap = q * e.value;
    return {q + gap, q, near, gap, q * e.excess, (terms.by_scores ? c.d : near) - terms.turn_zero};
  }
  const bool is_near = math::magnitude(near) <= T(1);
  const T log_p = (c.a - row.own_max) * terms.inv_student - row.own_log, log_q = log_weight - terms.log_sum;
  const T delta = is_near ? near : log_p == log_q ? T(0) : log_p - log_q;  // equal: absent on both sides
  const T difference = q * math::expm1(is_near ? near : T(0)), own = math::exp(log_p);
  const T gap = is_near ? difference : own - q, p = is_near ? q + difference : own;
  return {p, q, delta, gap, math::excess(q, gap, delta), (terms.by_scores ? c.d : delta) - terms.turn_zero};
}

// Slopes relative to that at the student's largest column (divergence.h). Of a mixture, only where the student has more
// of it than its teacher: elsewhere that column is none of those whose slopes are alike.
template <class Rule, class T>
FD_FUNCTION RowTerms<T> row_terms(RowStats<T> stats, const Tempering<T>& tempering, Mixture<T> mixture) {
  RowTerms<T> terms{stats, tempering.student.whole, tempering.teacher.whole, T(0), mixture, {}, false, T(0), T(0)};
  terms.log_sum = -static_cast<T>(::log(static_cast<double>(stats.inv_sum)));
  terms.stats.own_log += T(0) * stats.inv_sum;  // a teacher that is NaN, or nothing at all, stays visible on both sides
  if constexpr (Rule::centred) {
    const Scores<T> top = scores(stats.top_student, stats.top_teacher, tempering);
    Column<T> c = column<false>(top, terms);
    T zero = T(0);
    const bool usable = math::magnitude(top.d) < T(1e6);
    if constexpr (Rule::mixture) {
      zero = math::clamp(c.delta, T(0), T(kFarthestOrigin));
      terms.by_scores = usable && zero == c.delta;
      terms.origin = Rule::origin(mixture, zero);
    } else {
      terms.by_scores = usable;
    }
    terms.turn_zero = terms.by_scores ? top.d : zero;
    c.turn = terms.by_scores ? T(0) : c.delta - zero;
    terms.anchor = Rule::share(c, mixture, terms.origin).slope;
  }
  return terms;
}

template <class Rule, bool kNearBlock, class T>
FD_FUNCTION Column<T> rule_column(Scores<T> c, const RowTerms<T>& row) {
  if (Rule::softmax) return column<kNearBlock>(c, row);
  return {T(0), row.stats.inv_sum, c.d, T(0), T(0), T(0)};
}

template <class T>
struct Result {
  T value, centre, gradient;  // shares of the row's value and centre; the gradient in the tempered student logit
};

template <class Rule, bool kNearBlock, class T>
FD_FUNCTION Result<T> result(Scores<T> scores, const RowTerms<T>& row) {
  const Column<T> c = rule_column<Rule, kNearBlock>(scores, row);
  const Share<T> share = Rule::share(c, row.mixture, row.origin);
  if (!Rule::centred) return {share.value, T(0), share.slope};
  const T slope = share.slope - row.anchor;
  return {share.value, c.p * slope, c.p * (slope - row.stats.centre)};
}

}  // namespace FD_ISA
}  // namespace fastdistil
