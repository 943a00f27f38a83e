// A column of two rows of logits, and the two softmaxes' exact difference (docs/losses.md, section 1).
#pragma once

#include "divergence.h"

namespace fastdistil {
inline namespace FD_ISA {

// How logits become differences of scores: (s - s')/T_s - (t - t')/T_t with one column's s' and t', the shift's, or
// (s - t - shift) / T where the temperatures agree. KL does not see such a constant, but subtracted late it would cost
// the difference its digits.
template <class T>
struct Tempering {
  T inv_student, inv_teacher;
  double wide_student, wide_teacher;  // the same
  bool equal;
  T student, teacher;  // the shift's column; s - t and 0 where the temperatures agree
  double shift;
  bool given;  // s - t stands in the student's place, the temperatures agree

  FD_FUNCTION void shift_to(T s, T t) {
    student = equal ? s - t : s, teacher = equal ? T(0) : t;
    // One rounding named, so that forward and backward, compiled apart, have the same shift.
    shift = equal ? static_cast<double>(student) : ::fma(static_cast<double>(s), wide_student, -(t * wide_teacher));
  }

  FD_FUNCTION double difference(T s, T t) const {
    if (equal) return (static_cast<double>(s) - t - shift) * wide_student;
    return (static_cast<double>(s) - student) * wide_student - (static_cast<double>(t) - teacher) * wide_teacher;
  }
};

template <class T>
FD_FUNCTION Tempering<T> tempering_of(double student_temperature, double teacher_temperature, bool given = false) {
  const double s = 1.0 / student_temperature, t = 1.0 / teacher_temperature;
  const bool equal = student_temperature == teacher_temperature;
  return {static_cast<T>(s), static_cast<T>(t), s, t, equal, T(0), T(0), 0.0, given};
}

template <class T>
struct Scores {
  T a, b, d;  // logits of student and teacher as they are; the difference of their scores, tempered and shifted
};

// Which of the forms below a row needs.
enum class Form { plain, shifted, tempered, given };

template <class T>
FD_FUNCTION Form form_of(const Tempering<T>& row) {
  if (row.given) return Form::given;
  return !row.equal ? Form::tempered : row.shift != 0 ? Form::shifted : Form::plain;
}

// Of every form the rounding is that of the result's own size. Where both sides are -inf it is 0; kFinite: where a side
// is infinite it may be anything that is not near, infinite or NaN.
template <Form kForm, bool kFinite = false, class T>
FD_FUNCTION T score_difference(T s, T t, const Tempering<T>& row) {
  if (kForm == Form::given) return (s - static_cast<T>(row.shift)) * row.inv_student;
  if (kForm == Form::plain) return (!kFinite && s == t ? T(0) : s - t) * row.inv_student;
  const bool absent = !kFinite && s == T(-INFINITY) && t == T(-INFINITY);
  if (kForm == Form::shifted) {
    const T x = s - t, back = x - s;
    const T error = (s - (x - back)) - (t + back);  // s - t - x exactly, NaN where x is infinite
    const T d = (x - static_cast<T>(row.shift)) + (kFinite || error == error ? error : T(0));
    return absent ? T(0) : d * row.inv_student;
  }
  return absent ? T(0) : static_cast<T>(row.difference(s, t));
}

template <class T>
FD_FUNCTION Scores<T> scores(T student, T teacher, const Tempering<T>& row) {
  if (row.given) return {teacher + student, teacher, score_difference<Form::given>(student, teacher, row)};
  const T d = row.equal ? score_difference<Form::shifted>(student, teacher, row)
                        : score_difference<Form::tempered>(student, teacher, row);
  return {student, teacher, d};
}

// A difference that a row may be shifted by, or measured against: none where one side is infinite.
template <class T>
FD_FUNCTION bool usable(T d) {
  return math::magnitude(d) < T(1e6);
}

// The first guess at a shift: one of three columns, of three different ones, that another one agrees with, so that no
// single column spoils it. misplaced() tells whether it was good. False where none was found and one of them is not on
// both sides.
template <class T>
FD_FUNCTION bool guess_shift(Tempering<T>& row, Scores<T> first, Scores<T> second, Scores<T> third) {
  const T before = static_cast<T>(row.difference(first.a, first.b));
  const T middle = static_cast<T>(row.difference(second.a, second.b));
  const T behind = static_cast<T>(row.difference(third.a, third.b));
  const auto agree = [](T x, T y) { return usable(x) && math::magnitude(x - y) <= math::magnitude(x) / T(8); };
  if (agree(middle, before) || agree(middle, behind))
    row.shift_to(second.a, second.b);
  else if (agree(before, behind))
    row.shift_to(first.a, first.b);
  else
    return usable(before) && usable(middle) && usable(behind);
  return true;
}

// Up to this |d| (and |r|, and |D|) one expm1 serves both sides: beyond, q may underflow where p does not.
constexpr double kNear = 20;

// What the masses are measured by: the teacher's largest logit so far, the student's there, the scores' difference.
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
  Accumulator spent = 0;   // the terms that X had when the unit changed, in the unit of today
  bool unmatched = false;  // the student has no logit at the teacher's largest column

  FD_FUNCTION Unit<T> unit() const {
    return {max > T(-INFINITY) ? max : T(0), own > T(-INFINITY) ? own : T(0), reference};
  }

  // To another largest column. 0 stays 0, however far away they are.
  FD_FUNCTION void move(T max, T own, T reference, T inv_student, T inv_teacher) {
    if (this->max == max && this->own == own && this->reference == reference) return;  // else inf * 0
    const Accumulator turn = static_cast<Accumulator>(this->reference) - reference;
    const Accumulator other = math::exp((static_cast<Accumulator>(this->own) - own) * inv_student);
    const Accumulator factor = math::exp((static_cast<Accumulator>(this->max) - max) * inv_teacher);
    spent = spent + sum == Accumulator(0) ? spent : (spent + sum) * other;
    const Accumulator turned = math::magnitude(turn) <= Accumulator(1) ? factor * math::expm1(turn) : other - factor;
    difference = (difference == Accumulator(0) ? Accumulator(0) : difference * other) +
                 (sum == Accumulator(0) ? Accumulator(0) : sum * turned);
    sum = sum == Accumulator(0) ? Accumulator(0) : sum * factor;
    this->max = max, this->own = own, this->reference = reference;
  }

  // A column comes that may be the largest yet. Where the student has none there, its logit is taken to be that of
  // which the scores' difference is 0, up to rounding, which is kept: at logits of 1e4 it is 1e-4 of the mass.
  FD_FUNCTION void raise(Scores<T> c, const Tempering<T>& row) {
    if (c.b > max) {
      unmatched = !usable(c.d);
      if (unmatched) {
        const double b = c.b;
        c.a = static_cast<T>(row.equal ? b + row.shift : (b * row.wide_teacher + row.shift) / row.wide_student);
        c.d = static_cast<T>(row.difference(c.a, c.b));
      }
      move(c.b, c.a, c.d, row.inv_student, row.inv_teacher);
    } else if (max == T(-INFINITY) && c.a > own) {
      move(max, c.a, T(0), row.inv_student, row.inv_teacher);
    }
  }
};

// Whether X has lost its digits on the way: it was once the difference of masses far larger than the student's, which
// is what counts in the unit of today, or was infinite.
template <class T, class Accumulator>
FD_FUNCTION bool lost(const Masses<T, Accumulator>& masses) {
  const Accumulator mass = masses.difference + masses.sum;
  return !(masses.spent <= Accumulator(16) * mass) ||
         (masses.spent > Accumulator(0) && !(mass < Accumulator(INFINITY)));
}

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
  T by_scores;          // 1: turn is d - turn_zero, 0: delta - turn_zero; a bool keeps loops from vectorising
  T turn_zero, anchor;  // anchor: the slope at the student's largest column
  T top_student, top_teacher, top_delta;  // the logits there, and their delta
};

template <bool kNearBlock, class T>
FD_FUNCTION Column<T> column(Scores<T> c, const RowTerms<T>& terms) {
  const RowStats<T>& row = terms.stats;
  const T log_weight = (c.b - row.max) * terms.inv_teacher, q = math::exp_nonpositive(log_weight) * row.inv_sum;
  const T near = (c.d - row.reference) - row.log_ratio;
  if (kNearBlock) {
    const math::Expm1<T> e = math::bounded_expm1(near);
    const T gap = q * e.value;
    // Not q + gap: far below its teacher, p would be what is left of two numbers that cancel.
    const T turn = (terms.by_scores > T(0) ? c.d : near) - terms.turn_zero;
    return {q * e.whole, q, near, gap, q * e.excess, turn, T(0), {e.value, e.whole}};
  }
  const T log_p = (c.a - row.own_max) * terms.inv_student - row.own_log, log_q = log_weight - terms.log_sum;
  // Each has a rounding of its own size: of small terms, what is left of them may be smaller yet. At the teacher's
  // largest column d and its reference are one number.
  const T size_near = c.d == row.reference ? math::magnitude(row.log_ratio)
                                           : math::magnitude(c.d) + math::magnitude(row.reference + row.log_ratio);
  const T size_delta = math::magnitude(log_p) + math::magnitude(log_q);
  const T size_left = math::magnitude(near) <= T(1) && size_delta < T(kNear) ? T(kNear) : size_delta;
  const T delta = size_near <= size_left ? near : log_p - log_q;
  const bool is_near = math::magnitude(delta) <= T(1);
  const T difference = q * math::expm1(is_near ? delta : T(0)), own = math::exp(log_p);
  const T gap = is_near ? difference : own - q, p = is_near ? q + difference : own;
  // Of the three forms of a difference from the top's delta, that with the smallest terms (top_delta's own error is the
  // origin's too).
  const T from_top = (c.a - terms.top_student) * terms.inv_student,
          other = (c.b - terms.top_teacher) * terms.inv_teacher;
  const T size_d = math::magnitude(c.d) + math::magnitude(terms.turn_zero);
  const T size_top = math::magnitude(from_top) + math::magnitude(other);
  const T by_logits = size_top <= size_delta ? from_top - other : delta - terms.top_delta;
  const T by_scores = size_d <= size_top && (is_near || size_d <= size_delta) ? c.d - terms.turn_zero : by_logits;
  const T turn = terms.by_scores > T(0) ? by_scores : delta - terms.turn_zero;
  return {p, q, delta, gap, math::excess(q, gap, delta), turn, math::beyond_growth(-turn), math::growth(delta)};
}

// Slopes relative to that at the student's largest column (divergence.h). Of a mixture, only where the student has more
// of it than its teacher: elsewhere that column is none of those whose slopes are alike.
template <class Rule, class T>
FD_FUNCTION RowTerms<T> row_terms(RowStats<T> stats, const Tempering<T>& tempering, Mixture<T> mixture) {
  RowTerms<T> terms{
      stats, tempering.inv_student, tempering.inv_teacher, T(0), mixture, {}, T(0), T(0), T(0), T(0), T(0), T(0)};
  const double log_sum = -::log(static_cast<double>(stats.inv_sum));
  terms.log_sum = static_cast<T>(log_sum);
  // Where the rows lie far apart, D is the difference of their logarithms after all; measured from the shift's column
  // where it is smaller there.
  if (stats.log_ratio == T(INFINITY)) {
    const double whole = tempering.difference(stats.own_max, stats.max) + (stats.own_log - log_sum);
    const double rest = whole - stats.reference;
    const bool whole_is_smaller = math::magnitude(whole) < math::magnitude(rest);
    terms.stats.log_ratio = static_cast<T>(whole_is_smaller ? whole : rest);
    if (whole_is_smaller) terms.stats.reference = T(0);
  }
  terms.stats.own_log += T(0) * stats.inv_sum;  // a teacher that is NaN, or nothing at all, stays visible on both sides
  if constexpr (Rule::centred) {
    const Scores<T> top = scores(stats.top_student, stats.top_teacher, tempering);
    Column<T> c = column<false>(top, terms);
    T zero = T(0);
    if constexpr (Rule::mixture) {
      zero = math::clamp(c.delta, T(0), T(kFarthestOrigin));
      terms.by_scores = usable(top.d) && zero == c.delta ? T(1) : T(0);
      terms.origin = Rule::origin(mixture, zero);
    } else {
      terms.by_scores = usable(top.d) ? T(1) : T(0);
      terms.origin.log_ratio = terms.by_scores > T(0) ? c.delta : T(0);
    }
    terms.turn_zero = terms.by_scores > T(0) ? top.d : zero;
    terms.top_student = top.a, terms.top_teacher = top.b, terms.top_delta = c.delta;
    c.turn = terms.by_scores > T(0) ? T(0) : c.delta - zero;
    c.beyond = T(0);
    terms.anchor = Rule::share(c, mixture, terms.origin).slope;
  }
  return terms;
}

template <class Rule, bool kNearBlock, class T>
FD_FUNCTION Column<T> rule_column(Scores<T> c, const RowTerms<T>& row) {
  if (Rule::softmax) return column<kNearBlock>(c, row);
  return {T(0), row.stats.inv_sum, c.d, T(0), T(0), T(0), T(0), {}};
}

// A column of a centred rule: its shares of the row's value and centre, and what its gradient p (slope - centre) is
// made of once the row's centre is known. Of a direct rule, slope is the gradient.
template <class T>
struct Terms {
  T value, p, slope;
};

template <class Rule, bool kNearBlock, class T>
FD_FUNCTION Terms<T> terms_of(Scores<T> scores, const RowTerms<T>& row) {
  const Column<T> c = rule_column<Rule, kNearBlock>(scores, row);
  const Share<T> share = Rule::share(c, row.mixture, row.origin);
  return {share.value, c.p, Rule::centred ? share.slope - row.anchor : share.slope};
}

template <class T>
struct Result {
  T value, centre, gradient;  // shares of the row's value and centre; the gradient in the tempered student logit
};

template <class Rule, bool kNearBlock, class T>
FD_FUNCTION Result<T> result(Scores<T> scores, const RowTerms<T>& row) {
  const Terms<T> c = terms_of<Rule, kNearBlock>(scores, row);
  if (!Rule::centred) return {c.value, T(0), c.slope};
  return {c.value, c.p * c.slope, c.p * (c.slope - row.stats.centre)};
}

}  // namespace FD_ISA
}  // namespace fastdistil
