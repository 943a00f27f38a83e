// The K + 1 outcomes of topk.cpp: a pair of rows in float64, value and gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../rules/pair.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

// The K + 1 outcomes of one row: scores of student and teacher, and the gradient in the student's.
struct Outcomes {
  std::vector<double> student, teacher, gradient;

  explicit Outcomes(int64_t k) : student(k + 1), teacher(k + 1), gradient(k + 1) {}
};

double sum_exp(const std::vector<double>& x, double largest) {
  double sum = 0;
  for (const double v : x) sum += std::exp(v - largest);
  return sum;
}

template <class Rule>
double divergence(Outcomes& o, double beta) {
  const int n = static_cast<int>(o.student.size());
  const auto scores = [&o](int i) {
    const double a = o.student[i], b = o.teacher[i];
    return Scores<double>{a, b, a == b ? 0.0 : a - b};
  };
  Masses<double, double> masses;
  const int top = static_cast<int>(std::max_element(o.teacher.begin(), o.teacher.end()) - o.teacher.begin());
  masses.raise(o.teacher[top], scores(top).d);
  for (int i = 0; i < n; ++i) {
    const Mass<double> share = mass<false>(scores(i), masses.unit(), masses.reference);
    masses.sum += share.sum, masses.difference += share.difference;
  }
  RowStats<double> stats{};
  stats.max = masses.max > -INFINITY ? masses.max : NAN;  // no teacher at all is an error that must stay visible
  stats.inv_sum = 1.0 / masses.sum, stats.reference = masses.reference;
  exact_log_ratio(masses.difference / masses.sum, stats.log_ratio);
  stats.own_max = *std::max_element(o.student.begin(), o.student.end());
  stats.own_log = std::log(sum_exp(o.student, stats.own_max));
  RowTerms<double> row = row_terms<Rule>(stats, beta);
  // Slopes relative to the student's own largest outcome: the gradient there, of a student that is sure of it, is the
  // difference of a slope and almost the same mean.
  const int own = static_cast<int>(std::max_element(o.student.begin(), o.student.end()) - o.student.begin());
  if (Rule::centred) row.anchor = Rule::share(column<false>(scores(own), row), beta).slope;
  double value = 0;
  for (int pass = Rule::centred ? 0 : 1; pass < 2; ++pass) {
    double v = 0, centre = 0;
    for (int i = 0; i < n; ++i) {
      const Result<double> r = result<Rule, false>(scores(i), row, beta);
      v += r.value, centre += r.centre;
      o.gradient[i] = r.gradient;
    }
    value = v;
    if (pass == 0) row.stats.centre = centre;
  }
  return value;
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fastdistil
