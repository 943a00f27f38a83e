// __half with CUDA's conversions: to nearest, ties to even. Slow and plain: ldexp and nearbyint do the work.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t raw;
};

inline float __half2float(__half x) {
  const int exponent = x.raw >> 10 & 31, mantissa = x.raw & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25)
                                    : std::ldexp(static_cast<float>(mantissa), -24);
  return x.raw >> 15 ? -size : size;
}

inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds beyond 65504
  int exponent;
  std::frexp(size, &exponent);                             // size = f * 2^exponent, f in [1/2, 1)
  const int unit = size < 0x1p-14f ? -24 : exponent - 11;  // of the last place
  const auto places = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  return {static_cast<uint16_t>(sign | ((unit + 24) * 1024 + places))};  // 2048 carries into the exponent by itself
}
