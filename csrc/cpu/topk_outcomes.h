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

// 1 - sum of e^u with full precision for a confident teacher; rounding may leave it a little below 0.
double rest_of_teacher(const double* u, int64_t k) {
  const int64_t at = std::max_element(u, u + k) - u;
  double rest = -std::expm1(u[at]);
  for (int64_t i = 0; i < k; ++i)
    if (i != at) rest -= std::exp(u[i]);
  return rest;
}

template <class Rule>
double divergence(Outcomes& o, double beta) {
  const int n = static_cast<int>(o.student.size());
  const Tempering<double> tempering = tempering_of<double>(1, 1);  // temperatures are in the scores already
  const auto scores_at = [&](int i) { return scores(o.student[i], o.teacher[i], tempering); };
  const auto place_of_largest = [](const std::vector<double>& x) {
    return static_cast<int>(std::max_element(x.begin(), x.end()) - x.begin());
  };
  Masses<double, double> masses;
  masses.raise(scores_at(place_of_largest(o.teacher)), tempering);
  for (int i = 0; i < n; ++i) {
    const Mass<double> share = mass<false>(scores_at(i), masses.unit(), 1.0, 1.0);
    masses.sum += share.sum, masses.difference += share.difference;
  }
  RowStats<double> stats{};
  stats.max = masses.max > -INFINITY ? masses.max : NAN;  // no teacher at all is an error that must stay visible
  stats.inv_sum = 1.0 / masses.sum, stats.reference = masses.reference;
  exact_log_ratio(masses.difference / masses.sum, stats.log_ratio);
  const int top = place_of_largest(o.student);
  stats.own_max = stats.top_student = o.student[top], stats.top_teacher = o.teacher[top];
  stats.own_log = std::log(sum_exp(o.student, stats.own_max));
  RowTerms<double> row = row_terms<Rule>(stats, tempering, mixture_of<double>(beta));
  double value = 0;
  for (int pass = Rule::centred ? 0 : 1; pass < 2; ++pass) {
    double v = 0, centre = 0;
    for (int i = 0; i < n; ++i) {
      const Result<double> r = result<Rule, false>(scores_at(i), row);
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
