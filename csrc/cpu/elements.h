// Rows of any floating dtype as blocks of the type that is computed in, and back. Every loop vectorises.
#pragma once

#include <type_traits>

#include "../rules/math.h"

namespace fastdistil {
inline namespace FD_ISA {

struct bf16 {
  uint16_t raw;
};
struct f16 {
  uint16_t raw;
};

template <class E>
using Compute = std::conditional_t<std::is_same_v<E, double>, double, float>;

inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }
inline float to_compute(bf16 x) { return math::bits<float>(static_cast<uint32_t>(x.raw) << 16); }

inline float to_compute(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.raw & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.raw & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal on the way.
  const float scaled = math::bits<float>(rest) * 5.192296858534828e33f;
  const uint32_t special = rest >= 0x0f800000u ? 0x7f800000u : 0u;  // inf and NaN keep the top exponent
  return math::bits<float>(math::bits<uint32_t>(scaled) | special | sign);
}

// Rounding is to nearest, ties to even.
template <class E>
E from_compute(Compute<E> x);

template <>
inline float from_compute<float>(float x) {
  return x;
}
template <>
inline double from_compute<double>(double x) {
  return x;
}

template <>
inline bf16 from_compute<bf16>(float x) {
  const uint32_t u = math::bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

template <>
inline f16 from_compute<f16>(float x) {
  const uint32_t u = math::bits<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
  // Below 2^-14 the sum with 1/2 leaves the subnormal's bits at the bottom, rounded by the addition itself.
  const uint32_t subnormal = math::bits<uint32_t>(math::bits<float>(rest) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13;  // exponent bias 127 to 15
  uint32_t h = rest < 0x38800000u ? subnormal : normal;
  h = rest >= 0x477ff000u ? 0x7c00u : h;  // rounds beyond 65504
  h = rest > 0x7f800000u ? 0x7e00u : h;
  return {static_cast<uint16_t>(h | sign)};
}

// A block's elements as Compute<E>: in place for the compute type itself, else converted into `buffer`.
template <class E>
inline const Compute<E>* load_block(const E* source, Compute<E>* buffer, int n) {
  if constexpr (std::is_same_v<E, Compute<E>>) {
    return source;
  } else {
    for (int i = 0; i < n; ++i) buffer[i] = to_compute(source[i]);
    return buffer;
  }
}

}  // namespace FD_ISA
}  // namespace fastdistil
