// What the kernels over rows of logits share: element types, packs of 16 bytes, and sums over warps.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../csrc/rules/logit_args.h"
#include "../../csrc/rules/pair.h"

namespace fastdistil {
namespace {

template <class E>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class E>
using Compute = typename ComputeOf<E>::type;

__device__ inline float to_compute(float x) { return x; }
__device__ inline double to_compute(double x) { return x; }
__device__ inline float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_compute(__half x) { return __half2float(x); }
__device__ inline void from_compute(float x, float& y) { y = x; }
__device__ inline void from_compute(double x, double& y) { y = x; }
__device__ inline void from_compute(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void from_compute(float x, __half& y) { y = __float2half_rn(x); }

template <class E>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(E);
  E element[size];
};

// Elements from p to the next multiple of 16 bytes.
template <class E>
__device__ int ahead(const E* p) {
  return static_cast<int>((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(E));
}

// Masses of a part of a row (csrc/rules/pair.h); `far` is 1 where a column of it lies too far from the teacher's,
// `unmatched` where the student has none at the teacher's largest. top_*: the student's largest logit, and the
// teacher's in that column.
template <class T>
struct Part {
  T max, own, reference, far, unmatched, top_student, top_teacher;
  double sum, difference, spent;

  __device__ Masses<T, double> masses() const { return {max, own, reference, sum, difference, spent}; }
};

template <class T>
__device__ Part<T> no_part() {
  return {T(-INFINITY), T(-INFINITY), T(0), T(0), T(0), T(-INFINITY), T(-INFINITY), 0, 0, 0};
}

template <class T>
__device__ void take(Part<T>& part, const Masses<T, T>& masses) {
  part.max = masses.max, part.own = masses.own, part.reference = masses.reference;
  part.sum = masses.sum, part.difference = masses.difference, part.spent = masses.spent;
  part.unmatched = masses.unmatched ? T(1) : T(0);
}

template <class T>
__device__ T larger(T a, T b) {
  return a > b ? a : b;
}

// The whole's part from everybody's own; reduce(x, combine) gives everybody the same.
template <class T, class Reduce>
__device__ Part<T> merge(Part<T> own, const Tempering<T>& row, Reduce&& reduce) {
  Part<T> all;
  const auto largest = [&](T x) { return reduce(x, larger<T>); };
  const auto total = [&](double x) { return reduce(x, [](double a, double b) { return a + b; }); };
  all.max = largest(own.max);
  all.reference = largest(own.max == all.max ? own.reference : T(-INFINITY));
  all.own = largest(own.max == all.max && own.reference == all.reference ? own.own : T(-INFINITY));
  all.far = largest(own.far);
  all.unmatched = largest(own.max == all.max ? own.unmatched : T(0));
  all.top_student = largest(own.top_student);
  all.top_teacher = largest(own.top_student == all.top_student ? own.top_teacher : T(-INFINITY));
  Masses<T, double> masses = own.masses();
  masses.move(all.max, all.own, all.reference, row.inv_student, row.inv_teacher);
  all.sum = total(masses.sum), all.difference = total(masses.difference), all.spent = total(masses.spent);
  return all;
}

// The teacher's largest logit so far among the columns that both sides have, and the student's there.
template <class T>
struct Common {
  T teacher = -INFINITY, student = -INFINITY;

  __device__ void add(Scores<T> c) {
    if (c.b > teacher && usable(c.d)) teacher = c.b, student = c.a;
  }
  __device__ Part<T> part() const {
    Part<T> part = no_part<T>();
    part.max = teacher, part.own = student;
    return part;
  }
};

// Measured from the whole's largest column on, whatever the shift is now.
template <class T>
__device__ Masses<T, T> masses_from(const Part<T>& all, const Tempering<T>& row) {
  Masses<T, T> masses;
  const T none = static_cast<T>(INFINITY);
  masses.raise({all.own, all.max, all.unmatched > T(0) ? none : scores(all.own, all.max, row).d}, row);
  return masses;
}

// The row's masses, and its shift as good as can be: read(from) is a pass that measures from there on, common() one for
// the largest column of both sides. All threads decide alike.
template <class T, class Read, class Find>
__device__ Part<T> read_row(Tempering<T>& row, Read&& read, Find&& common) {
  Part<T> all = no_part<T>();
  for (bool repeated = false, shifted = false;;) {  // one place for read(), whose loop is long
    all = read(all);
    if (!repeated && !shifted && lost(all.masses())) {
      repeated = true;
      continue;
    }
    if (shifted) return all;
    shifted = true;
    if (misplaced(all.masses())) {
      row.shift_to(all.own, all.max);
      continue;
    }
    if (all.unmatched == T(0) || row.shift != 0) return all;
    const Part<T> found = common();
    if (found.max == T(-INFINITY)) return all;
    row.shift_to(found.own, found.max);
  }
}

// The student's own softmax so far.
template <class T>
struct OwnSum {
  T max = -INFINITY, sum = 0;

  __device__ void add(T a, T inv) {
    if (a > max) sum = sum == T(0) ? T(0) : sum * math::exp((max - a) * inv), max = a;
    sum += math::exp((a - (max > T(-INFINITY) ? max : T(0))) * inv);
  }
  // Measured as the mass of a student whose teacher has none.
  __device__ Part<T> part() const {
    Part<T> part = no_part<T>();
    part.own = max, part.difference = sum;
    return part;
  }
};

template <class T, class Combine>
__device__ T combine_lanes(T x, Combine&& combine) {
  for (int offset = 16; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// From the row's columns at a quarter, a half and three quarters; where none agree and one of them is not on both
// sides, from one of sixteen that most others agree with (csrc/cpu/logit.cpp: guess_among_many). By whole warps.
template <class E, class T>
__device__ void guess_row_shift(Tempering<T>& row, const E* student, const E* teacher, int64_t columns) {
  const auto at = [&](int64_t i) { return Scores<T>{to_compute(student[i]), to_compute(teacher[i]), T(0)}; };
  if (columns >= 3 && guess_shift(row, at(columns / 4), at(columns / 2), at(columns * 3 / 4))) return;
  constexpr int kMost = 16;
  const int n = columns < kMost ? static_cast<int>(columns) : kMost, lane = threadIdx.x % 32;
  const auto difference = [&](int i) {
    const Scores<T> c = at(columns * i / n);
    return static_cast<T>(row.difference(c.a, c.b));
  };
  const T own = difference(lane < n ? lane : 0);
  int best = -1, most = 1;
  for (int i = 0; i < n; ++i) {
    const T d = difference(i);
    if (!usable(d)) continue;  // the same for every lane
    const int vote = lane < n && math::magnitude(own - d) <= math::magnitude(d) / T(8);
    const int alike = combine_lanes(vote, [](int a, int b) { return a + b; });
    if (alike > most) best = i, most = alike;
  }
  if (best < 0) return;
  const Scores<T> c = at(columns * best / n);
  row.shift_to(c.a, c.b);
}

template <class T>
__device__ void save(T* saved, const RowStats<T>& stats, const Tempering<T>& row) {
  saved[kMax] = stats.max, saved[kInvSum] = stats.inv_sum, saved[kLogRatio] = stats.log_ratio;
  saved[kCentre] = stats.centre, saved[kReference] = stats.reference;
  saved[kOwnMax] = stats.own_max, saved[kOwnLog] = stats.own_log;
  saved[kTopStudent] = stats.top_student, saved[kTopTeacher] = stats.top_teacher;
  saved[kShift] = row.student, saved[kShiftTeacher] = row.teacher;
}

}  // namespace
}  // namespace fastdistil
