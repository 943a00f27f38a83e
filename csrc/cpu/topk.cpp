// Divergence from a teacher of K known columns, value and gradient (docs/losses.md, section 1a).
//
// Bytes: each student row is read once from memory for the mass of the other columns and again, from the L2 cache, for
// the gradient, which is written once. So the floor is (1 read + 1 write) x N x V x bytes an element over the copy
// bandwidth. FLOPs: one exponential a column and pass, about 20. The K + 1 outcomes are float64 and cost next to
// nothing.
//
// Compiled once an instruction set (FD_ISA); dispatch.cpp chooses at run time.
#include "../rules/topk_args.h"

#include "elements.h"
#include "index.h"
#include "topk_outcomes.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

constexpr int kBlock = 512;  // columns
constexpr int kLanes = 16;   // floats of the widest vector: blocks are padded to a multiple, so that no loop has a tail

// e^x for x <= 0 within 1e-11, in a form that vectorises (libm's does not).
inline double wide_exp(double x) {
  const double bounded = x < -700.0 ? -700.0 : x;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to the nearest integer
  const double shifted = bounded * 1.4426950408889634 + magic;
  const double n = shifted - magic;
  const double r = (bounded - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;  // ln 2 in two parts
  double s = 1.0 / 3628800;
  s = s * r + 1.0 / 362880;
  s = s * r + 1.0 / 40320;
  s = s * r + 1.0 / 5040;
  s = s * r + 1.0 / 720;
  s = s * r + 1.0 / 120;
  s = s * r + 1.0 / 24;
  s = s * r + 1.0 / 6;
  s = s * r + 0.5;
  const double power = math::bits<double>((math::bits<uint64_t>(shifted) + 1023u) << 52);
  return x < -700.0 ? 0.0 : power + power * (r + r * r * s);
}

template <class T>
T block_max(const T* x, int n) {
  T largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// Sum of e^((z - largest) / T); kWide: in float64, for a sum that is compared with the teacher's own.
template <bool kWide, class T>
double block_sum(const T* z, int n, T largest, double inv_temperature) {
  if constexpr (kWide && std::is_same_v<T, float>) {
    const double m = largest;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += wide_exp((static_cast<double>(z[i]) - m) * inv_temperature);
    return sum;
  } else {
    const T inv_t = static_cast<T>(inv_temperature);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += math::exp_nonpositive((z[i] - largest) * inv_t);
    return sum;
  }
}

template <class E>
void block_gradient(const Compute<E>* z, int n, Compute<E> largest, Compute<E> inv_t, Compute<E> factor, E* gradient) {
  using T = Compute<E>;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const T x = (z[i] - largest) * inv_t;
    gradient[i] = from_compute<E>(factor * math::exp_nonpositive(x > T(0) ? T(0) : x));  // > 0: a named column
  }
}

template <class E>
struct Block {
  using T = Compute<E>;
  T z[kBlock];
  E out[kBlock];

  // The row's columns from `begin` on, padded with -inf to the returned number.
  int load(const E* row, int64_t begin, int n) {
    for (int i = 0; i < n; ++i) z[i] = to_compute(row[begin + i]);
    const int padded = (n + kLanes - 1) / kLanes * kLanes;
    for (int i = n; i < padded; ++i) z[i] = -INFINITY;
    return padded;
  }
};

template <class E>
class Kernel {
  using T = Compute<E>;
  const TopkArgs& args_;
  double (*divergence_)(Outcomes&, double) = nullptr;

 public:
  explicit Kernel(const TopkArgs& args) : args_(args) {
    with_rule(static_cast<Divergence>(args.divergence), [&](auto rule) {
      if constexpr (decltype(rule)::softmax) divergence_ = &divergence<decltype(rule)>;
    });
  }

  T scale(int64_t r) const { return static_cast<const T*>(args_.row_scale)[r]; }
  T dloss(int64_t r) const { return args_.dloss ? static_cast<const T*>(args_.dloss)[r] : T(1); }
  const E* student(int64_t r) const { return static_cast<const E*>(args_.student) + r * args_.student_stride; }
  E* gradient(int64_t r) const {
    return args_.gradient ? static_cast<E*>(args_.gradient) + r * args_.gradient_stride : nullptr;
  }
  double* stats(int64_t r) const { return args_.stats + r * (kTopkStats + args_.k); }

  // The row's K columns, read once; false where they do not ascend from 0.
  bool read_columns(int64_t r, std::vector<int32_t>& columns) const {
    int32_t least = 0;
    for (size_t i = 0; i < columns.size(); ++i) {
      columns[i] = read_once(args_.named + r * args_.k + static_cast<int64_t>(i));
      if (columns[i] < least) return false;
      least = columns[i];
    }
    return true;
  }

  // A float gradient that is there already is only scaled, which it has the precision for.
  bool keeps(int64_t r) const {
    if (!args_.keep_unit) return false;
    const T factor = dloss(r);
    if (factor == T(1) || scale(r) == 0) return true;
    if constexpr (std::is_same_v<E, T>) {
      E* g = gradient(r);
      for (int64_t i = 0; i < args_.columns; ++i) g[i] *= factor;
      return true;
    }
    return false;
  }

  void zero(int64_t r) const {
    if (args_.loss) {
      static_cast<T*>(args_.loss)[r] = T(0);
      std::fill_n(stats(r), kTopkStats + args_.k, 0.0);
    }
    if (E* g = gradient(r)) std::fill_n(g, args_.columns, E{});
  }

  // Of columns that do not ascend, which the ops never make: visible, and nothing is read or written by them.
  void nothing(int64_t r) const {
    if (args_.loss) {
      static_cast<T*>(args_.loss)[r] = static_cast<T>(NAN);
      std::fill_n(stats(r), kTopkStats + args_.k, static_cast<double>(NAN));
    }
    if (E* g = gradient(r)) std::fill_n(g, args_.columns, from_compute<E>(static_cast<T>(NAN)));
  }

  void forward(int64_t r, Block<E>& block, Outcomes& o, const std::vector<int32_t>& named) const {
    const double* u = args_.values + r * args_.k;
    double largest, mass;
    if (args_.tail == Tail::renormalize)
      rest_of_student<false>(r, block, named, largest, mass);
    else
      rest_of_student<true>(r, block, named, largest, mass);
    // Scores are relative to the student's largest logit: an offset of all of them costs no digits.
    double top = mass == 0 ? -INFINITY : largest;
    for (size_t i = 0; i < named.size(); ++i) {
      const bool there = named[i] < args_.columns;
      o.student[i] = there ? static_cast<double>(to_compute(student(r)[named[i]])) : -INFINITY;
      o.teacher[i] = u[i];
      if (o.student[i] > top) top = o.student[i];
    }
    if (!std::isfinite(top)) top = 0;
    for (int64_t i = 0; i < args_.k; ++i) o.student[i] = (o.student[i] - top) / args_.temperature;
    o.student[args_.k] = mass == 0 ? -INFINITY : (largest - top) / args_.temperature + std::log(mass);
    o.teacher[args_.k] = args_.tail == Tail::bucket ? args_.rest[r] : -INFINITY;
    finish(r, o, largest, mass, divergence_(o, args_.beta));
    if (gradient(r)) backward(r, block, named);
  }

  void backward(int64_t r, Block<E>& block, const std::vector<int32_t>& named) const {
    const double* s = stats(r);
    const T largest = static_cast<T>(s[kLargest]), factor = static_cast<T>(s[kFactor] * dloss(r));
    const T inv_t = static_cast<T>(1.0 / args_.temperature);
    E* g = gradient(r);
    for (int64_t begin = 0; begin < args_.columns; begin += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(args_.columns - begin, kBlock));
      const int padded = block.load(student(r), begin, n);
      block_gradient<E>(block.z, padded, largest, inv_t, factor, padded == n ? g + begin : block.out);
      if (padded != n) std::copy(block.out, block.out + n, g + begin);
    }
    for (size_t i = 0; i < named.size() && named[i] < args_.columns; ++i)
      g[named[i]] = from_compute<E>(static_cast<T>(s[kTopkStats + i] * dloss(r)));
  }

 private:
  // Largest logit outside of the K columns (0 where there is none), and the sum of e^((z - largest) / T).
  template <bool kWide>
  void rest_of_student(int64_t r, Block<E>& block, const std::vector<int32_t>& named, double& largest,
                       double& mass) const {
    const double inv_t = 1.0 / args_.temperature;
    auto next = named.begin(), end = named.end();
    T m = -INFINITY;
    mass = 0;
    for (int64_t begin = 0; begin < args_.columns; begin += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(args_.columns - begin, kBlock));
      const int padded = block.load(student(r), begin, n);
      for (; next != end && *next < begin + n; ++next) block.z[*next - begin] = -INFINITY;
      const T here = block_max(block.z, padded);
      if (here > m) {
        mass = mass == 0 ? 0 : mass * std::exp((static_cast<double>(m) - here) * inv_t);
        m = here;
      }
      mass += block_sum<kWide>(block.z, padded, m > T(-INFINITY) ? m : T(0), inv_t);
    }
    largest = m > T(-INFINITY) ? m : T(0);
  }

  // The row's value, and what its gradient is made of.
  void finish(int64_t r, const Outcomes& o, double largest, double mass, double value) const {
    const double scale = static_cast<double>(this->scale(r)) * args_.value_factor;
    double part = scale / args_.temperature;
    bool none = false;
    if (args_.tail == Tail::zero) {
      // The divergence is about as large as -ln(total): a confident teacher's difference needs all digits of both.
      double total = 0;
      for (int64_t i = 0; i < args_.k; ++i) total += std::exp(o.teacher[i]);
      const double rest = args_.rest[r];
      none = total == 0;
      value = none ? 0 : total * (value + (rest < 0.5 ? std::log1p(-rest) : std::log(total)));
      part *= total;
    }
    static_cast<T*>(args_.loss)[r] = static_cast<T>(value * scale);
    double* s = stats(r);
    s[kLargest] = largest;
    s[kFactor] = none || mass == 0 ? 0 : o.gradient[args_.k] * part / mass;
    for (int64_t i = 0; i < args_.k; ++i) s[kTopkStats + i] = none ? 0 : o.gradient[i] * part;
  }
};

template <class E>
void run(const TopkArgs& args, int threads) {
  const Kernel<E> kernel(args);
  const int64_t share = 1 + 16 * kBlock / (args.columns + 1);
  if (args.rows <= share) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    Block<E> block;
    Outcomes outcomes(args.k);
    std::vector<int32_t> columns(static_cast<size_t>(args.k));
#pragma omp for schedule(dynamic, share)
    for (int64_t r = 0; r < args.rows; ++r) {
      if (kernel.keeps(r)) continue;
      if (kernel.scale(r) == 0)
        kernel.zero(r);
      else if (!kernel.read_columns(r, columns))
        kernel.nothing(r);
      else if (args.loss)
        kernel.forward(r, block, outcomes, columns);
      else
        kernel.backward(r, block, columns);
    }
  }
}

}  // namespace

void topk(const TopkArgs& args, int threads) {
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
