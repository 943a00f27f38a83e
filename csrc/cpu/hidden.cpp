// Distance of two hidden states, value and gradient (docs/losses.md, section 3), without activation.
//
// Bytes: student and teacher are read once, the gradient is written once (cosine reads a second time, from L1).
#include "../rules/hidden_args.h"

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

template <class T>
struct Products {
  T hh, tt, ht, rh;  // of h and t; r = h - t
};

template <class T>
__attribute__((noinline)) Products<T> products(const T* h, const T* t, int n) {
  T hh = 0, tt = 0, ht = 0, rh = 0;
#pragma omp simd reduction(+ : hh, tt, ht, rh)
  for (int i = 0; i < n; ++i) {
    hh += h[i] * h[i], tt += t[i] * t[i];
    ht += h[i] * t[i], rh += (h[i] - t[i]) * h[i];
  }
  return {hh, tt, ht, rh};
}

// The sum of w^2, w the part of h - t that is left without `part` of h; out: factor w.
template <class T>
__attribute__((noinline)) T squared_rest(const T* h, const T* t, T part, T factor, T* out, int n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    const T w = (h[i] - t[i]) - part * h[i];
    sum += w * w;
    out[i] = w * factor;
  }
  return sum;
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
      zero(r);
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

  void zero(int64_t r) const {
    if (!args_.gradient) return;
    const T zeros[kBlock] = {};
    for (int64_t begin = 0; begin < args_.columns; begin += kBlock) {
      const int64_t n = args_.columns - begin < kBlock ? args_.columns - begin : kBlock;
      store(zeros, args_.gradient, args_.gradient_dtype, r * args_.columns + begin, static_cast<int>(n));
    }
  }

  double mean_square(int64_t r, T scale) const {
    const T factor = T(2) * scale / static_cast<T>(args_.columns);
    double total = 0;
    for_blocks(r, args_.gradient,
               [&](const T* h, const T* t, T* out, int n) { total += squared_difference(h, t, factor, out, n); });
    return total / static_cast<double>(args_.columns);
  }

  // 1 - cos = |w|^2 / (|t|^2 (1 + cos)) with w the part of h - t perpendicular to h: nothing cancels near the teacher.
  double cosine(int64_t r, T scale) const {
    double h2 = 0, t2 = 0, ht = 0, rh = 0;
    for_blocks(r, false, [&](const T* h, const T* t, T*, int n) {
      const Products<T> p = products(h, t, n);
      h2 += p.hh, t2 += p.tt, ht += p.ht, rh += p.rh;
    });
    if (!(h2 != 0 && t2 != 0)) {  // cos = 0 by definition
      zero(r);
      return 1;
    }
    const T part = static_cast<T>(rh / h2), factor = static_cast<T>(scale / std::sqrt(h2) / std::sqrt(t2));
    double perpendicular = 0;
    for_blocks(r, args_.gradient, [&](const T* h, const T* t, T* out, int n) {
      perpendicular += squared_rest(h, t, part, factor, out, n);
    });
    const double cos = ht / std::sqrt(h2) / std::sqrt(t2);
    return cos > 0 ? perpendicular / (t2 * (1 + cos)) : 1 - cos;
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
