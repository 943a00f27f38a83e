// The first pass over a row pair of logits: its shift, the masses of both sides, D = log1p(X/S) (docs/losses.md,
// section 1).
#pragma once

#include "logit_block.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

// The student's own maximum and ln of sum(exp(a - maximum)): where a column lies too far from the teacher's.
template <class T>
void own_softmax(Row<T>& row, Block<T>& block) {
  LogSum<T> own;
  for_blocks(row, block, [&](int64_t, int n, int) { own.add(block.a, n, row.tempering.inv_student); });
  row.stats.own_max = own.max, row.stats.own_log = static_cast<T>(own.log());
}

template <bool kNearBlock, class T>
void add_part(const Block<T>& block, int from, int to, const Tempering<T>& tempering, Masses<T, double>& masses) {
  const Unit<T> unit = masses.unit();
  const T inv_student = tempering.inv_student, inv_teacher = tempering.inv_teacher;
  const T *a = block.a, *b = block.b, *d = block.d;
  T sum = 0, difference = 0;
#pragma omp simd reduction(+ : sum, difference)
  for (int i = from; i < to; ++i) {
    const Mass<T> part = mass<kNearBlock>(Scores<T>{a[i], b[i], d[i]}, unit, inv_student, inv_teacher);
    sum += part.sum;
    difference += part.difference;
  }
  masses.sum += sum;
  masses.difference += difference;
}

// What one loop over a block finds.
struct BlockSums {
  double sum = 0, difference = 0, excess = 0;  // the first two as of Masses; of w (e^x - 1 - x)
  float largest = -INFINITY, own_largest = -INFINITY;
  int far = 0;  // 1: some column is not near
};

// As add_part of columns near each other. kTop: with the student's largest logit, else w and e^x - 1 of each are kept.
// kLoaded: the differences are in block.d, and nothing is asked of them.
template <Form kForm, bool kTop, bool kLoaded>
void sum_part(const Block<float>& block, int from, int to, Tempering<float> row, Unit<float> unit, float* weights,
              float* growths, BlockSums& sums) {
  const float *a = block.a, *b = block.b, *d = block.d;
  float sum = 0, difference = 0, excess = 0, largest = -INFINITY, own_largest = -INFINITY;
  int far = 0;
#pragma omp simd reduction(+ : sum, difference, excess) reduction(max : largest, own_largest) reduction(| : far)
  for (int i = from; i < to; ++i) {
    const float x = kLoaded ? d[i] : score_difference<kForm, true>(a[i], b[i], row);
    if (!kLoaded) {
      far |= !(math::magnitude(x) <= float(kNear));
      largest = b[i] > largest ? b[i] : largest;
    }
    const float weight = math::exp_nonpositive((b[i] - unit.teacher) * row.inv_teacher);
    const math::Expm1<float> e = math::bounded_expm1(x - unit.difference);
    sum += weight;
    difference += weight * e.value;
    if constexpr (kTop) {
      own_largest = a[i] > own_largest ? a[i] : own_largest;
    } else {
      excess += weight * e.excess;
      weights[i] = weight;
      growths[i] = e.value;
    }
  }
  sums.sum += sum, sums.difference += difference, sums.excess += excess;
  sums.largest = largest > sums.largest ? largest : sums.largest;
  sums.own_largest = own_largest > sums.own_largest ? own_largest : sums.own_largest;
  sums.far |= far;
}

template <Form kForm, bool kTop, bool kLoaded>
BlockSums sum_block(const Block<float>& block, int n, const Tempering<float>& row, Unit<float> unit, float* weights,
                    float* growths) {
  BlockSums sums;
  for_parts(
      n, [&](int from, int to) { sum_part<kForm, kTop, kLoaded>(block, from, to, row, unit, weights, growths, sums); });
  return sums;
}

template <bool kNearBlock, class T>
void add_block(const Block<T>& block, int n, const Tempering<T>& tempering, Masses<T, double>& masses) {
  for_parts(n, [&](int from, int to) { add_part<kNearBlock>(block, from, to, tempering, masses); });
}

// What a pass finds.
template <class T>
struct Found {
  Masses<T, double> masses;
  double excess = 0, largest = 0;  // the sum of w (e^x - 1 - x), and of what it was made of
  int64_t top = -1;                // the teacher's largest column
  bool near = true;                // every column lies near its teacher's
  bool usual = true;               // no column has been absent on both sides
  bool lost = false;               // masses.difference has lost its digits on the way

  // Masses are measured by column `at` from here on.
  void raise(Scores<T> c, int64_t at, const Tempering<T>& row) {
    const Masses<T, double> before = masses;
    masses.raise(c, row);
    if (masses.max > T(-INFINITY)) top = at;
    lost = lost || loses(before, row.inv_student);
    turn_excess(before, row.inv_teacher);
  }

  // Sums of a block in the unit of today.
  void add(const BlockSums& sums) {
    masses.sum += sums.sum, masses.difference += sums.difference, excess += sums.excess;
  }

  // The row's KL(q || p) = sum q (e^delta - 1 - delta), where delta = x - D, e^D = 1 + X/S: that of x less e^D - 1 - D.
  // False where the two are nearly the same.
  bool value(double& kl) const {
    const double ratio = masses.difference / masses.sum, of_x = excess / masses.sum;
    kl = of_x - (ratio - std::log1p(ratio));
    return kl >= kFewestDigits * std::max(of_x, largest / masses.sum);
  }

 private:
  // The smallest part of a sum that a difference may leave of it: its rounding grows by as much.
  static constexpr double kFewestDigits = 1.0 / 32;

  // x + t for x: e^(x+t) - 1 - (x+t) = (e^x - 1 - x) + (e^x - 1)(e^t - 1) + (e^t - 1 - t).
  void turn_excess(const Masses<T, double>& before, T inv_teacher) {
    if (before.sum == 0) return;
    const double t = static_cast<double>(before.reference) - masses.reference, e = std::expm1(t);
    const double factor = std::exp((static_cast<double>(before.max) - masses.max) * inv_teacher);
    const double parts[] = {excess, before.difference * e, before.sum * (e - t)};
    excess = factor * (parts[0] + parts[1] + parts[2]);
    largest = factor * std::max({largest, parts[0], std::abs(parts[1]), parts[2]});
  }

  // X is the student's mass less the teacher's S. Where the former is but a small part of the latter, X has few digits
  // of it, none that counts unless the student's mass grows by the move to another column. An infinite X stays so.
  bool loses(const Masses<T, double>& before, T inv_student) const {
    if (before.sum == 0) return !std::isfinite(before.difference);
    if (before.difference >= -0.875 * before.sum && std::isfinite(before.difference)) return false;
    const double grows = std::exp((static_cast<double>(before.own) - masses.own) * inv_student);
    return !std::isfinite(before.difference) || before.sum * grows > 1;
  }
};

// In one loop, a block that changes no unit and has not the student's largest logit, as most do. False where it is
// none, and nothing has happened.
template <bool kTop>
bool add_usual_block(const Row<float>& row, const Block<float>& block, int64_t begin, int n, float top,
                     Found<float>& found, Kept<float>* kept) {
  const Unit<float> unit = found.masses.unit();
  const Form form = form_of(row.tempering);
  if (found.masses.max == -INFINITY || !(math::magnitude(unit.difference) <= float(kNear))) return false;
  if (form != Form::plain && form != Form::shifted) return false;
  const auto sum = form == Form::plain ? sum_block<Form::plain, kTop, false> : sum_block<Form::shifted, kTop, false>;
  float *weights = kTop ? nullptr : kept->first(begin), *growths = kTop ? nullptr : kept->second(begin);
  const BlockSums sums = sum(block, n, row.tempering, unit, weights, growths);
  found.usual = !sums.far;
  if (sums.far || sums.largest > unit.teacher || sums.own_largest > top) return false;
  if (!kTop) kept->unit(begin) = unit;
  found.add(sums);
  return true;
}

// The masses of the whole row; kTop: the student's largest logit too. at: a column to begin with, the teacher's largest
// of an earlier pass, or -1. `kept`, unless null, gets each column's weight and growth while all lie near.
template <bool kTop, class T>
Found<T> add_row(Row<T>& row, Block<T>& block, Kept<T>* kept, int64_t at = -1) {
  Found<T> found;
  Masses<T, double>& masses = found.masses;
  if (at >= 0) found.raise(scores(row.student[at], row.teacher[at], row.tempering), at, row.tempering);
  T top = -INFINITY;
  if (kTop) row.stats.top_student = row.stats.top_teacher = -INFINITY;
  for_columns(row, [&](int64_t begin, int columns) {
    int n = 0;
    if constexpr (std::is_same_v<T, float>)
      if ((kTop || kept) && found.near && found.usual && !block.whole && !row.tempering.given) {
        if (!kTop && kept->gradient) kept->gradient.prefetch(begin, columns);
        n = block.load_logits(row, begin, columns);
        if (add_usual_block<kTop>(row, block, begin, n, top, found, kept)) return;
        block.subtract(row, n);
        block.whole = columns == row.columns;
      }
    if (n == 0) n = block.padded(row, begin, columns);
    if (kTop) {
      const T own = block_max(block.a, n);
      if (own > top) {
        const int at = place_of(block.a, n, own);
        row.stats.top_student = row.tempering.given ? row.student[begin + at] : own;
        row.stats.top_teacher = block.b[at], top = own;
      }
    }
    const T largest = block_max(block.b, n);
    if (largest > masses.max) {
      const int at = place_of(block.b, n, largest);
      found.raise(block.at(at), begin + at, row.tempering);
    } else if (masses.max == T(-INFINITY)) {
      masses.raise(block.at(place_of(block.a, n, block_max(block.a, n))), row.tempering);
    }
    const bool near_block = block.near && math::magnitude(masses.reference) <= T(kNear);
    found.near = found.near && near_block;
    if constexpr (!kTop && std::is_same_v<T, float>)
      if (kept && found.near) {
        const Unit<T> unit = kept->unit(begin) = masses.unit();
        T *weights = kept->first(begin), *growths = kept->second(begin);
        return found.add(sum_block<Form::plain, false, true>(block, n, row.tempering, unit, weights, growths));
      }
    near_block ? add_block<true>(block, n, row.tempering, masses) : add_block<false>(block, n, row.tempering, masses);
  });
  return found;
}

// Of a row of which some columns are not on both sides: shifts to that of some columns which most others agree with.
template <class T, class At>
void guess_among_many(Tempering<T>& row, int64_t columns, At&& column_at) {
  constexpr int64_t kMost = 16;
  const int n = static_cast<int>(std::min(columns, kMost));
  T d[kMost];
  for (int i = 0; i < n; ++i) {
    const Scores<T> c = column_at(columns * i / n);
    d[i] = static_cast<T>(row.difference(c.a, c.b));
  }
  int best = -1, most = 1;
  for (int i = 0; i < n; ++i) {
    if (!usable(d[i])) continue;
    int alike = 0;
    for (int j = 0; j < n; ++j) alike += math::magnitude(d[j] - d[i]) <= math::magnitude(d[i]) / T(8);
    if (alike > most) best = i, most = alike;
  }
  if (best < 0) return;
  const Scores<T> c = column_at(columns * best / n);
  row.shift_to(c.a, c.b);
}

// Shifts to the teacher's largest column that both sides have; false where there is none.
template <class T>
bool shift_to_common(Row<T>& row) {
  T student = 0, largest = -INFINITY;
  for (int64_t i = 0; i < row.columns; ++i) {
    const T s = row.student[i], t = row.tempering.given ? T(0) : row.teacher[i];
    if (t > largest && usable(static_cast<T>(row.tempering.difference(s, t)))) student = s, largest = t;
  }
  if (largest == T(-INFINITY)) return false;
  row.tempering.shift_to(student, largest);
  return true;
}

// The teacher's maximum and sum, and D = log1p(X/S). A `part` of a row may have no teacher mass. With `kept`, true
// where it holds the whole row, whose KL(q || p) is then kl.
template <bool kCentred, class T>
bool statistics(Row<T>& row, Block<T>& block, bool part, Kept<T>* kept, double& kl) {
  const auto column_at = [&row](int64_t i) {
    return Scores<T>{row.student[i], row.tempering.given ? T(0) : row.teacher[i], T(0)};
  };
  if (row.columns < 3 || !guess_shift(row.tempering, column_at(row.columns / 4), column_at(row.columns / 2),
                                      column_at(row.columns * 3 / 4)))
    guess_among_many(row.tempering, row.columns, column_at);
  Found<T> found = add_row<kCentred>(row, block, kept);
  const auto again = [&] {
    block.whole = false;
    found = add_row<kCentred>(row, block, kept, found.top);
  };
  if (found.lost) again();
  if (misplaced(found.masses)) {
    row.tempering.shift_to(found.masses.own, found.masses.max);
    again();
  } else if (found.masses.unmatched && row.tempering.shift == 0 && shift_to_common(row)) {
    again();
  }
  const Masses<T, double>& masses = found.masses;
  const T max = masses.max;
  row.stats.max = max > T(-INFINITY) || part ? max : T(NAN);  // a teacher of -inf alone is an error: keep it visible
  row.stats.inv_sum = static_cast<T>(1.0 / masses.sum);
  row.stats.reference = masses.reference;
  if (exact_log_ratio(masses.difference / masses.sum, row.stats.log_ratio) && found.near)
    own_from_teacher(row.stats, masses.own, masses.sum);
  else
    own_softmax(row, block);
  return kept && found.near && near_row(row.stats) && found.value(kl);
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fastdistil
