// The mathematics of sparse updates, one copy for host and device (docs/losses.md, section 6).
#pragma once

#include "math.h"
#include "sparse_args.h"

namespace fastdistil {
inline namespace FD_ISA {

constexpr uint32_t kInfinityBits = 0x7f800000u;  // above it: NaN

// |a - b| as float32, as an integer that orders as it does.
FD_FUNCTION uint32_t change_bits(float a, float b) { return math::bits<uint32_t>(a - b) & 0x7fffffffu; }
FD_FUNCTION uint32_t change_bits(double a, double b) {
  return math::bits<uint32_t>(static_cast<float>(a - b)) & 0x7fffffffu;
}

template <class T>
struct AdamW {
  T decay, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, inv_bias2_sqrt, l1;

  template <class C>
  FD_FUNCTION static AdamW from(const C* constants) {
    return {static_cast<T>(constants[kDecay]),        static_cast<T>(constants[kOneMinusBeta1]),
            static_cast<T>(constants[kBeta2]),        static_cast<T>(constants[kOneMinusBeta2]),
            static_cast<T>(constants[kEps]),          static_cast<T>(constants[kStepSize]),
            static_cast<T>(constants[kInvBias2Sqrt]), static_cast<T>(constants[kL1])};
  }
};

FD_FUNCTION float square_root(float x) { return sqrtf(x); }
FD_FUNCTION double square_root(double x) { return sqrt(x); }

// One entry's step, torch.optim.AdamW's order of operations.
template <class T>
FD_FUNCTION void adamw(const AdamW<T>& c, T gradient, T& value, T& exp_avg, T& exp_avg_sq) {
  value *= c.decay;
  exp_avg += (gradient - exp_avg) * c.one_minus_beta1;
  exp_avg_sq = exp_avg_sq * c.beta2 + gradient * gradient * c.one_minus_beta2;
  value -= c.step_size * exp_avg / (square_root(exp_avg_sq) * c.inv_bias2_sqrt + c.eps);
}

// The gradient of l1 * |value - base|.
template <class T>
FD_FUNCTION T pull(T l1, T value, T base) {
  return value > base ? l1 : value < base ? -l1 : T(0);
}

}  // namespace FD_ISA
}  // namespace fastdistil
