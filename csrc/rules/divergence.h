// The divergences of two softmax rows, each written once for CPU and CUDA (formulas: docs/losses.md, section 1).
//
// A rule sees one column: student probability p, teacher probability q, delta = log p - log q (exact), gap = p - q
// (exact), excess = q (e^delta - 1 - delta), and gives the column's share of the row's value and of its gradient in the
// tempered student logit:
//   direct rules:   gradient = slope
//   centred rules:  gradient = p (slope - sum over the row of p slope)
// Columns go by value: an address taken inside a loop would keep it from vectorising.
// All values are sums of non-negative terms: nothing cancels when the student has almost become the teacher.
//
// A constant taken off all slopes changes nothing. Where the student is sure of a column, the gradient there is what is
// left of that column's slope less the mean of all, which is nearly the same number: so slopes are formed relative to
// that column's, as functions of `turn`, the delta less that column's (`Origin`).
#pragma once

#include "logit_args.h"
#include "math.h"

namespace fastdistil {
inline namespace FD_ISA {

// A student may be 60 above its teacher at its largest column and 80 below it elsewhere: `beyond` is how far -turn lies
// beyond what an exponential holds. 0 in blocks of columns that are near each other.
template <class T>
struct Column {
  T p, q, delta, gap, excess, turn, beyond;
  math::Growth<T> forth;  // of delta
};

template <class T>
struct Share {
  T value, slope;
};

// The two weights of a mixture: beta, and 1 - beta, which is formed from the caller's double.
template <class T>
struct Mixture {
  T beta, rest;
};

template <class T>
FD_FUNCTION Mixture<T> mixture_of(double beta) {
  return {static_cast<T>(beta), static_cast<T>(1.0 - beta)};
}

// Where slopes are 0, given by a delta (log_ratio itself of rules without a mixture). For a mixture m = own p + other q
// with u = m/p and x = q/p = e^-delta there, and E = expm1(-turn): u = u_there (share_own + share_other e^-turn) =
// u_there (1 + share_other E).
template <class T>
struct Origin {
  T share_own, share_other, log_ratio, other_over_mixture;  // of m; ln u; x / u^2
};

// A delta up to which an origin is taken; e^-delta still has room below in a float.
constexpr double kFarthestOrigin = 60;

template <class T>
FD_FUNCTION Origin<T> origin_of(T own, T other, T delta) {
  const math::Growth<T> x = math::growth(-delta);
  const T u = own + other * x.whole;
  return {own / u, other * x.whole / u, math::log_both(other * x.less_one, u).value, x.whole / (u * u)};
}

// The largest |log(p/q)| that counts in a gradient.
constexpr double kLargestSlope = 1e4;

struct ForwardKL {  // KL(q || p)
  static constexpr bool centred = false, mixture = false, softmax = true;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, Mixture<T>, Origin<T>) {
    return {c.excess, c.gap};
  }
};

struct ReverseKL {  // KL(p || q)
  static constexpr bool centred = true, mixture = false, softmax = true;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, Mixture<T>, Origin<T> origin) {
    // log(p/q) is infinite where one side is 0; a finite stand-in keeps gradients free of NaN.
    const T turn = math::clamp(c.turn, -T(kLargestSlope) - origin.log_ratio, T(kLargestSlope) - origin.log_ratio);
    return {math::excess(c.p, -c.gap, -c.delta), turn};
  }
};

struct JensenShannon {  // beta KL(q || m) + (1-beta) KL(p || m), m = beta q + (1-beta) p
  static constexpr bool centred = true, mixture = true, softmax = true;
  template <class T>
  static FD_FUNCTION Origin<T> origin(Mixture<T> mix, T delta) {
    return origin_of(mix.rest, mix.beta, delta);
  }
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, Mixture<T> mix, Origin<T> origin) {
    const math::Growth<T> back = math::growth(-c.turn), forth = c.forth;
    const T turned =
        math::log_both(origin.share_other * back.less_one, origin.share_own + origin.share_other * back.whole).value +
        c.beyond;
    const T m_over_p = origin.log_ratio + turned;
    const T m_over_q = math::log_both(mix.rest * forth.less_one, mix.beta + mix.rest * forth.whole).value;
    const T value = mix.beta * math::excess(c.q, mix.rest * c.gap, m_over_q) +
                    mix.rest * math::excess(c.p, -mix.beta * c.gap, m_over_p);
    return {value, -mix.rest * turned};
  }
};

struct SkewKL {  // KL(q || m), m = beta q + (1-beta) p
  static constexpr bool centred = true, mixture = true, softmax = true;
  template <class T>
  static FD_FUNCTION Origin<T> origin(Mixture<T> mix, T delta) {
    return origin_of(mix.rest, mix.beta, delta);
  }
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, Mixture<T> mix, Origin<T> origin) {
    const math::Growth<T> back = math::growth(-c.turn), forth = c.forth;
    const T m_over_q = math::log_both(mix.rest * forth.less_one, mix.beta + mix.rest * forth.whole).value;
    const T u = origin.share_own + origin.share_other * back.whole;
    // -(1-beta) q/m; the quotient first: x/u^2 may be more than 1, the exponential all that a float holds
    const T slope = -mix.rest * mix.rest * (origin.other_over_mixture * (back.less_one / u));
    return {math::excess(c.q, mix.rest * c.gap, m_over_q), slope};
  }
};

struct SkewReverseKL {  // KL(p || m), m = beta p + (1-beta) q
  static constexpr bool centred = true, mixture = true, softmax = true;
  template <class T>
  static FD_FUNCTION Origin<T> origin(Mixture<T> mix, T delta) {
    return origin_of(mix.beta, mix.rest, delta);
  }
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, Mixture<T> mix, Origin<T> origin) {
    const math::Growth<T> back = math::growth(-c.turn);
    const T y = origin.share_other * back.less_one, u = origin.share_own + origin.share_other * back.whole;
    const math::Log<T> log = math::log_both(y, u);
    const T whole_log = log.value + c.beyond;
    const T bounded = u < T(1e-30) ? T(1e-30) : u, v = y / bounded;
    // -beta p/m - ln(m/p): share_own v - ln u, where u is near 1 as a sum of two terms
    const T slope =
        math::magnitude(y) <= T(0.25) ? -log.excess - origin.share_other * v : origin.share_own * v - whole_log;
    return {math::excess(c.p, -mix.rest * c.gap, origin.log_ratio + whole_log), slope};
  }
};

struct TotalVariation {  // 1/2 sum |p - q|
  static constexpr bool centred = true, mixture = false, softmax = true;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, Mixture<T>, Origin<T>) {
    // Of delta, which does not underflow as the gap of two small probabilities does.
    const T sign = c.delta > T(0) ? T(0.5) : (c.delta < T(0) ? T(-0.5) : T(0));
    return {T(0.5) * math::magnitude(c.gap), sign};
  }
};

struct MeanSquare {  // (a - b)^2 / V: no softmax; delta is a - b, q is 1/V
  static constexpr bool centred = false, mixture = false, softmax = false;
  template <class T>
  static FD_FUNCTION Share<T> share(Column<T> c, Mixture<T>, Origin<T>) {
    return {c.delta * c.delta * c.q, T(2) * c.delta * c.q};
  }
};

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
