// Distance of two hidden states, value and gradient (docs/losses.md, section 3), without activation.
//
// Bytes: student and teacher are read once, the gradient is written once (cosine reads a second time, from L1). Float32
// rows that float32 cannot hold (a small angle, extreme lengths, a sum beyond its range) are read again, in double.
#include "../rules/hidden_args.h"

#include <algorithm>
#include <cmath>

#include "elements.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

constexpr int kBlock = 512;

template <class T, class E>
const T* converted(const void* source, int64_t begin, T* buffer, int n) {
  const E* elements = static_cast<const E*>(source) + begin;
  if constexpr (std::is_same_v<T, E>) {
    return elements;
  } else {
    for (int i = 0; i < n; ++i) buffer[i] = static_cast<T>(to_compute(elements[i]));
    return buffer;
  }
}

// n elements of any dtype as T, in place where they are T.
template <class T>
const T* load(const void* source, DType dtype, int64_t begin, T* buffer, int n) {
  switch (dtype) {
    case DType::f32:
      return converted<T, float>(source, begin, buffer, n);
    case DType::bf16:
      return converted<T, bf16>(source, begin, buffer, n);
    case DType::f16:
      return converted<T, f16>(source, begin, buffer, n);
    case DType::f64:
      return converted<T, double>(source, begin, buffer, n);
  }
  return buffer;
}

template <class T, class E>
void rounded(const T* values, void* target, int64_t begin, int n) {
  E* elements = static_cast<E*>(target) + begin;
  for (int i = 0; i < n; ++i) elements[i] = from_compute<E>(static_cast<Compute<E>>(values[i]));
}

template <class T>
void store(const T* values, void* target, DType dtype, int64_t begin, int n) {
  switch (dtype) {
    case DType::f32:
      return rounded<T, float>(values, target, begin, n);
    case DType::bf16:
      return rounded<T, bf16>(values, target, begin, n);
    case DType::f16:
      return rounded<T, f16>(values, target, begin, n);
    case DType::f64:
      return rounded<T, double>(values, target, begin, n);
  }
}

// The loops are functions of their own, because GCC 12 drops the simd where it inlines them.

// The sum of (h - t)^2; out: factor (h - t).
template <class T>
__attribute__((noinline)) T squared_difference(const T* h, const T* t, T factor, T* out, int n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    const T difference = h[i] - t[i];
    sum += difference * difference;
    out[i] = difference * factor;
  }
  return sum;
}

struct Products {
  double hh, tt, ht;  // of h and t
};

// Sums of n products in A, of h and t times a power of two each.
template <class A, class T>
__attribute__((noinline)) Products products(const T* h, const T* t, A h_unit, A t_unit, int n) {
  A hh = 0, tt = 0, ht = 0;
#pragma omp simd reduction(+ : hh, tt, ht)
  for (int i = 0; i < n; ++i) {
    const A x = static_cast<A>(h[i]) * h_unit, y = static_cast<A>(t[i]) * t_unit;
    hh += x * x, tt += y * y, ht += x * y;
  }
  return {static_cast<double>(hh), static_cast<double>(tt), static_cast<double>(ht)};
}

// The sum of w^2, w = part h - t; out: factor w.
template <class A, class T>
__attribute__((noinline)) A squared_rest(const T* h, const T* t, A part, A t_unit, A factor, T* out, int n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    const A w = part * static_cast<A>(h[i]) - static_cast<A>(t[i]) * t_unit;
    sum += w * w;
    out[i] = static_cast<T>(w * factor);
  }
  return sum;
}

// The sum of (h - t)^2 in double.
template <class T>
__attribute__((noinline)) double wide_squared_difference(const T* h, const T* t, int n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    const double difference = static_cast<double>(h[i]) - static_cast<double>(t[i]);
    sum += difference * difference;
  }
  return sum;
}

template <class T>
__attribute__((noinline)) T largest(const T* x, int n) {
  T found = 0;
#pragma omp simd reduction(max : found)
  for (int i = 0; i < n; ++i) found = std::max(found, std::abs(x[i]));
  return found;
}

// The power of two that brings a number near 1; the smallest subnormals stay small, but not their squares 0.
inline double unit_of(double x) {
  return x > 0 && x < INFINITY ? std::ldexp(1.0, std::clamp(-std::ilogb(x), -1000, 1000)) : 1.0;
}

template <class T>
class Kernel {
  const HiddenArgs& args_;

 public:
  explicit Kernel(const HiddenArgs& args) : args_(args) {}

  void row(int64_t r) const {
    const T scale = static_cast<const T*>(args_.row_scale)[r];
    double value = 0;
    if (scale == T(0))
      fill(r, T(0));
    else
      value = args_.kind == HiddenKind::mse ? mean_square(r, scale) : cosine(r, scale);
    static_cast<T*>(args_.loss)[r] = static_cast<T>(value * scale);
  }

 private:
  struct Block {
    T student[kBlock], teacher[kBlock], out[kBlock];
  };

  static constexpr DType kOwn = std::is_same_v<T, double> ? DType::f64 : DType::f32;

  // action(h, t, out, n) over the row's blocks, h with the bias in it; what it leaves in `out` is the gradient.
  template <class Action>
  void for_blocks(int64_t r, bool gradient, Action&& action) const {
    Block block;
    const T* bias = static_cast<const T*>(args_.bias);
    const bool in_place = gradient && args_.gradient_dtype == kOwn;
    for (int64_t begin = 0; begin < args_.columns; begin += kBlock) {
      const int n = static_cast<int>(args_.columns - begin < kBlock ? args_.columns - begin : kBlock);
      const T* h = load(args_.student, args_.student_dtype, r * args_.student_stride + begin, block.student, n);
      const T* t = load(args_.teacher, args_.teacher_dtype, r * args_.teacher_stride + begin, block.teacher, n);
      if (bias) {
        for (int i = 0; i < n; ++i) block.student[i] = h[i] + bias[begin + i];
        h = block.student;
      }
      action(h, t, in_place ? static_cast<T*>(args_.gradient) + r * args_.columns + begin : block.out, n);
      if (gradient && !in_place) store(block.out, args_.gradient, args_.gradient_dtype, r * args_.columns + begin, n);
    }
  }

  void fill(int64_t r, T number) const {
    if (!args_.gradient) return;
    T numbers[kBlock];
    std::fill_n(numbers, kBlock, number);
    for (int64_t begin = 0; begin < args_.columns; begin += kBlock) {
      const int64_t n = args_.columns - begin < kBlock ? args_.columns - begin : kBlock;
      store(numbers, args_.gradient, args_.gradient_dtype, r * args_.columns + begin, static_cast<int>(n));
    }
  }

  double mean_square(int64_t r, T scale) const {
    const T factor = T(2) * scale / static_cast<T>(args_.columns);
    double total = 0;
    for_blocks(r, args_.gradient,
               [&](const T* h, const T* t, T* out, int n) { total += squared_difference(h, t, factor, out, n); });
    if (kOwn == DType::f32 && !std::isfinite(total)) {  // the mean may be within float32's range all the same
      total = 0;
      for_blocks(r, false, [&](const T* h, const T* t, T*, int n) { total += wide_squared_difference(h, t, n); });
    }
    return total / static_cast<double>(args_.columns);
  }

  // The gradient is w / (|h| |t|) with w = part h - t, part = h t / |h|^2: the component of -t perpendicular to h; and
  // 1 - cos = |w|^2 / (|t|^2 (1 + cos)). The rounding of w is that of t, whatever the length of h is.
  double cosine(int64_t r, T scale) const {
    double h2 = 0, t2 = 0, ht = 0;
    for_blocks(r, false, [&](const T* h, const T* t, T*, int n) {
      const Products p = products<T, T>(h, t, T(1), T(1), n);
      h2 += p.hh, t2 += p.tt, ht += p.ht;
    });
    constexpr double longest = std::is_same_v<T, double> ? 1e200 : 1e30, smallest_square_of_sine = 1.0 / 256;
    const bool ordinary = h2 > 1 / longest && t2 > 1 / longest && h2 < longest && t2 < longest;
    const bool near = std::is_same_v<T, float> && !((ht / h2) * (ht / t2) < 1 - smallest_square_of_sine);
    if (!ordinary || near) return wide_cosine(r, scale);
    return rest(r, {h2, t2, ht}, scale, T(1), T(1));
  }

  // As `cosine`, in double, of the row's vectors times a power of two each where double has not their squares' range.
  double wide_cosine(int64_t r, T scale) const {
    double h_unit = 1, t_unit = 1;
    if (std::is_same_v<T, double>) {
      T h_top = 0, t_top = 0;
      for_blocks(r, false, [&](const T* h, const T* t, T*, int n) {
        h_top = std::max(h_top, largest(h, n)), t_top = std::max(t_top, largest(t, n));
      });
      h_unit = unit_of(h_top), t_unit = unit_of(t_top);
    }
    Products sums{0, 0, 0};
    for_blocks(r, false, [&](const T* h, const T* t, T*, int n) {
      const Products p = products<double, T>(h, t, h_unit, t_unit, n);
      sums.hh += p.hh, sums.tt += p.tt, sums.ht += p.ht;
    });
    if (!(sums.hh != 0 && sums.tt != 0)) {  // cos = 0 by definition
      fill(r, T(0) * scale);
      return 1;
    }
    if (args_.columns == 1 && std::isfinite(sums.ht)) {  // nothing is perpendicular
      fill(r, T(0) * scale);
      return sums.ht > 0 ? 0 : 2;
    }
    return rest(r, sums, static_cast<double>(scale), h_unit, t_unit);
  }

  template <class A>
  double rest(int64_t r, const Products& sums, A scale, A h_unit, A t_unit) const {
    const double norms = std::sqrt(sums.hh) * std::sqrt(sums.tt), cos = sums.ht / norms;
    const A part = static_cast<A>(sums.ht / sums.hh) * h_unit, factor = static_cast<A>(scale * h_unit / norms);
    double perpendicular = 0;
    for_blocks(r, args_.gradient, [&](const T* h, const T* t, T* out, int n) {
      perpendicular += squared_rest<A, T>(h, t, part, t_unit, factor, out, n);
    });
    return cos > 0 ? perpendicular / (sums.tt * (1 + cos)) : 1 - cos;
  }
};

template <class T>
void run(const HiddenArgs& args, int threads) {
  const Kernel<T> kernel(args);
  const int64_t share = 1 + 16 * kBlock / (args.columns + 1);
  if (args.rows <= share) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, share)
  for (int64_t r = 0; r < args.rows; ++r) kernel.row(r);
}

}  // namespace

void hidden(const HiddenArgs& args, int threads) {
  args.accumulator == DType::f64 ? run<double>(args, threads) : run<float>(args, threads);
}

}  // namespace FD_ISA
}  // namespace fastdistil
