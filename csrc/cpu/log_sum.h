// Sums of exponentials over a row that is worked on block by block.
#pragma once

#include <algorithm>
#include <cmath>

#include "../rules/math.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

constexpr int kBlock = 512;  // columns: five float blocks stay in L1

// Columns whose sum stays in a float: 64 terms a lane at most. Equal terms, as a flat row has them, are all rounded
// alike beside a large one: of 128 that is 1e-5 of the sum.
#if defined(__SSE2__) && !defined(__AVX__)
constexpr int kSummed = 256;
#elif defined(__aarch64__)
constexpr int kSummed = 256;
#else
constexpr int kSummed = kBlock;
#endif

template <class T>
T block_max(const T* x, int n) {
  T largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// Where a block's largest entry is; 0 where there is none.
template <class T>
int place_of(const T* x, int n, T largest) {
  const int at = static_cast<int>(std::find(x, x + n, largest) - x);
  return at < n ? at : 0;
}

// The largest of some numbers and the sum of e^((x - largest) factor) over all others: where one is far above the rest,
// 1 + others has no digits of them.
template <class T>
struct LogSum {
  T max = -INFINITY;
  double others = 0;

  double sum() const { return max > T(-INFINITY) ? 1 + others : others; }
  double log() const { return max > T(-INFINITY) ? std::log1p(others) : std::log(others); }

  // e^(x - largest) / sum - 1, of one of the numbers (at a factor of 1).
  double slope(T x) const { return x == max ? -others / sum() : std::exp(static_cast<double>(x) - max) / sum() - 1; }

  // A block, kBlock numbers at most.
  void add(const T* x, int n, T factor) {
    const T largest = block_max(x, n);
    if (!(largest > max)) return add_others<false>(x, n, factor, -1);
    others = sum() == 0 ? 0 : sum() * std::exp((static_cast<double>(max) - largest) * factor);
    max = largest;
    add_others<true>(x, n, factor, place_of(x, n, largest));
  }

 private:
  template <bool kTop>
  void add_others(const T* x, int n, T factor, int top) {
    const T m = max > T(-INFINITY) ? max : T(0);
    for (int from = 0; from < n; from += kSummed) {
      const int to = std::min(n, from + kSummed);
      T part = 0;
#pragma omp simd reduction(+ : part)
      for (int i = from; i < to; ++i) {
        const T weight = math::exp_nonpositive((x[i] - m) * factor);
        part += kTop && i == top ? weight - T(1) : weight;  // 0, or NaN
      }
      others += part;
    }
  }
};

}  // namespace
}  // namespace FD_ISA
}  // namespace fastdistil
