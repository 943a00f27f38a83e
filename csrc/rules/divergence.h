// The divergences of two softmax rows, each written once for CPU and CUDA (formulas: docs/losses.md, section 1).
//
// A rule sees one column: student probability p, teacher probability q, delta = log p - log q (exact), gap = p - q
// (exact), excess = q (e^delta - 1 - delta), and gives the column's share of the row's value and of its gradient in the
// tempered student logit:
//   direct rules:   gradient = slope
//   centred rules:  gradient = p (slope - sum over the row of p slope)
// Columns go by value: an address taken inside a loop would keep it from vectorising.
// All values are sums of non-negative terms: nothing cancels when the student has almost become the teacher.
#pragma once

#include "math.h"

namespace fastdistil {
inline namespace FD_ISA {

template <class T>
struct Column {
  T p, q, delta, gap, excess;
};

template <class T>
struct Share {
  T value, slope;
};

// log(p/q) is infinite where one side is 0; a finite stand-in keeps gradients free of NaN.
template <class T>
FD_FUNCTION T finite(T delta) {
  return math::clamp(delta, T(-1e4), T(1e4));
}

struct ForwardKL {  // KL(q || p)
  static constexpr bool centred = false, softmax = true;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, T) {
    return {c.excess, c.gap};
  }
};

struct ReverseKL {  // KL(p || q)
  static constexpr bool centred = true, softmax = true;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, T) {
    return {math::excess(c.p, -c.gap, -c.delta), finite(c.delta)};
  }
};

struct JensenShannon {  // beta KL(q || m) + (1-beta) KL(p || m), m = beta q + (1-beta) p
  static constexpr bool centred = true, softmax = true;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, T beta) {
    const T rest = T(1) - beta;
    const T m_over_q = math::log1p(rest * math::expm1(c.delta));
    const T m_over_p = math::log1p(beta * math::expm1(-c.delta));
    const T value =
        beta * math::excess(c.q, rest * c.gap, m_over_q) + rest * math::excess(c.p, -beta * c.gap, m_over_p);
    return {value, -rest * m_over_p};
  }
};

struct SkewKL {  // KL(q || m), m = beta q + (1-beta) p
  static constexpr bool centred = true, softmax = true;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, T beta) {
    const T rest = T(1) - beta;
    const T m_over_q = math::log1p(rest * math::expm1(c.delta));
    const T back = math::expm1(-c.delta);
    // 1 - q/m up to a constant factor, from q/p - 1 so that p -> 0 stays finite
    return {math::excess(c.q, rest * c.gap, m_over_q), -rest * rest * back / (T(1) + beta * back)};
  }
};

struct SkewReverseKL {  // KL(p || m), m = beta p + (1-beta) q
  static constexpr bool centred = true, softmax = true;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, T beta) {
    const T rest = T(1) - beta;
    const T skewed = rest * math::expm1(-c.delta);  // m/p - 1
    const T m_over_p = math::log1p(skewed);
    const T u = T(1) + skewed;
    const T slope = beta * skewed / (u < T(1e-30) ? T(1e-30) : u) - finite(m_over_p);
    return {math::excess(c.p, -rest * c.gap, m_over_p), slope};
  }
};

struct TotalVariation {  // 1/2 sum |p - q|
  static constexpr bool centred = true, softmax = true;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, T) {
    const T sign = c.gap > T(0) ? T(0.5) : (c.gap < T(0) ? T(-0.5) : T(0));
    return {T(0.5) * math::magnitude(c.gap), sign};
  }
};

struct MeanSquare {  // (a - b)^2 / V: no softmax; delta is a - b, q is 1/V
  static constexpr bool centred = false, softmax = false;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, T) {
    return {c.delta * c.delta * c.q, T(2) * c.delta * c.q};
  }
};

// The order is part of the bindings: fastdistil/losses/logit.py lists the same names.
enum class Divergence { forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd, mse };

template <class Action>
void with_rule(Divergence divergence, Action&& action) {
  switch (divergence) {
    case Divergence::forward_kl:
      return action(ForwardKL{});
    case Divergence::reverse_kl:
      return action(ReverseKL{});
    case Divergence::jsd:
      return action(JensenShannon{});
    case Divergence::skew_kl:
      return action(SkewKL{});
    case Divergence::skew_reverse_kl:
      return action(SkewReverseKL{});
    case Divergence::tvd:
      return action(TotalVariation{});
    case Divergence::mse:
      return action(MeanSquare{});
  }
}

}  // namespace FD_ISA
}  // namespace fastdistil
