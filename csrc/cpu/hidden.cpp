// Mean square of the difference of two hidden states, value and gradient in one pass (docs/losses.md, section 3).
//
// Bytes: each state is read once, the gradient written once: (2 reads + 1 write) x N x D over the copy bandwidth.
//
// Compiled once an instruction set (FD_ISA); dispatch.cpp chooses at run time.
#include "hidden_args.h"

#include "elements.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

template <class E, class G>
class Kernel {
  using T = Compute<E>;
  const HiddenArgs& args_;
  const T mean_;

 public:
  explicit Kernel(const HiddenArgs& args)
      : args_(args), mean_(static_cast<T>(1.0 / static_cast<double>(args.columns))) {}

  void row(int64_t r) const {
    const T scale = static_cast<const T*>(args_.row_scale)[r];
    G* gradient = args_.gradient ? static_cast<G*>(args_.gradient) + r * args_.gradient_stride : nullptr;
    T value = 0;
    if (scale != T(0)) {
      const E* student = static_cast<const E*>(args_.student) + r * args_.student_stride;
      const E* teacher = static_cast<const E*>(args_.teacher) + r * args_.teacher_stride;
      const T* bias = static_cast<const T*>(args_.bias);
      const T factor = 2 * scale * mean_;
      if (bias)
        value = gradient ? pass<true, true>(student, teacher, bias, factor, gradient)
                         : pass<true, false>(student, teacher, bias, factor, gradient);
      else
        value = gradient ? pass<false, true>(student, teacher, bias, factor, gradient)
                         : pass<false, false>(student, teacher, bias, factor, gradient);
    } else if (gradient) {
      for (int64_t i = 0; i < args_.columns; ++i) gradient[i] = G{};
    }
    static_cast<T*>(args_.rows)[r] = scale == T(0) ? T(0) : value * mean_ * scale;
  }

 private:
  template <bool kBias, bool kGradient>
  T pass(const E* student, const E* teacher, const T* bias, T factor, G* gradient) const {
    T value = 0;
#pragma omp simd reduction(+ : value)
    for (int64_t i = 0; i < args_.columns; ++i) {
      T x = to_compute(student[i]);
      if (kBias) x += bias[i];
      const T difference = x - to_compute(teacher[i]);
      value += difference * difference;
      if (kGradient) gradient[i] = from_compute<G>(factor * difference);
    }
    return value;
  }
};

template <class E, class G>
void run(const HiddenArgs& args, int threads) {
  const Kernel<E, G> kernel(args);
  if (args.rows_count * args.columns < (1 << 15)) threads = 1;  // waking a thread costs as much
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < args.rows_count; ++r) kernel.row(r);
}

template <class E>
void run(const HiddenArgs& args, int threads) {
  return args.wide_gradient ? run<E, Compute<E>>(args, threads) : run<E, E>(args, threads);
}

}  // namespace

void hidden_mse(const HiddenArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f32:
      return run<float>(args, threads);
    case DType::bf16:
      return run<bf16>(args, threads);
    case DType::f16:
      return run<f16>(args, threads);
    case DType::f64:
      return run<double>(args, threads);
  }
}

}  // namespace FD_ISA
}  // namespace fastdistil
