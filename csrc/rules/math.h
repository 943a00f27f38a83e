// Elementary functions that every rule uses, for host and device, float and double.
//
// Host float functions are branch-free polynomials, so that a loop over them vectorises for any instruction set:
// libm's calls would not. Device and double use the platform's functions, which are accurate to an ulp or two.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define FD_FUNCTION __host__ __device__ __forceinline__
#else
#define FD_FUNCTION inline __attribute__((always_inline))
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

// The CPU sources are compiled once an instruction set; the name keeps the linker from mixing the copies.
#ifndef FD_ISA
#define FD_ISA generic
#endif

namespace fastdistil {
inline namespace FD_ISA {
namespace math {

template <class To, class From>
FD_FUNCTION To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits: sizes differ");
  To result;
  std::memcpy(&result, &x, sizeof(To));
  return result;
}

constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLn2High = 0.693359375f;  // 9 bits: n * kLn2High is exact for |n| < 2^15
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kHalfLn2 = 0.34657359f;
constexpr float kExpMin = -87.33654f;  // e^x is subnormal below
constexpr float kExpZero = -88.0f;     // reduce() gives a power of 0 from here on
constexpr float kExpMax = 88.0f;       // 2^127 is the largest factor that the exponent field holds

template <class T>
FD_FUNCTION T clamp(T x, T low, T high) {  // a NaN passes through
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <class T>
FD_FUNCTION T magnitude(T x) {
  return x < T(0) ? -x : x;
}

// (e^r - 1 - r) / r^2 for |r| <= ln(2)/2, within 1.9e-7 of itself: the minimax polynomial of degree 4, which has half
// the error of Taylor's first six terms before rounding, with one term less.
FD_FUNCTION float excess_series(float r) {
#if defined(__CUDA_ARCH__)
  float s = 1.3901297e-3f;
  s = s * r + 8.3631702e-3f;
  s = s * r + 4.1666854e-2f;
  s = s * r + 1.6666577e-1f;
  return s * r + 0.5f;
#else
  // In pairs: what a loop of exponentials waits for on a CPU is this chain.
  const float low = 1.6666577e-1f * r + 0.5f, high = 8.3631702e-3f * r + 4.1666854e-2f, square = r * r;
  return (1.3901297e-3f * square + high) * square + low;
#endif
}

FD_FUNCTION double excess_series(double r) {
  double s = 0.0;
  double reciprocal = 4.77947733238738529744e-14;  // 1/16!
  for (int n = 16; n >= 2; --n) {
    s = s * r + reciprocal;
    reciprocal *= n;
  }
  return s;
}

// x = n ln 2 + r with |r| <= ln(2)/2; x within [kExpZero, kExpMax] (NaN gives NaN in r).
FD_FUNCTION void reduce(float x, float& n, float& r, float& power) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float shifted = x * 1.44269504f + magic;
  n = shifted - magic;
  r = (x - n * kLn2High) - n * kLn2Low;
  power = bits<float>((bits<uint32_t>(shifted) + 127u) << 23);  // 2^n: the low bits of `shifted` hold n
}

FD_FUNCTION float exp(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  float n, r, power;
  reduce(clamp(x, kExpZero, kExpMax), n, r, power);
  return power + power * (r + r * r * excess_series(r));
#endif
}

FD_FUNCTION double exp(double x) { return ::exp(x); }

#if defined(__CUDA_ARCH__)
// e^x by the GPU's own 2^x, two instructions: off by 2^-22, and by |x| 2^-24 for the rounded factor. Softmax weights
// may be that much off together, as long as every pass is off alike. (The emulation of tests/ brings its own 2^x.)
#if !defined(FD_EXP2)
FD_FUNCTION float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#define FD_EXP2 exp2_approx
#endif
FD_FUNCTION float exp_approx(float x) { return FD_EXP2(x * 1.44269504f); }
#endif

// e^x for x <= 0, or NaN: softmax weights relative to their maximum.
FD_FUNCTION float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return exp_approx(x);
#else
  float n, r, power;
  reduce(x < kExpZero ? kExpZero : x, n, r, power);
  return power + power * (r + r * r * excess_series(r));
#endif
}

FD_FUNCTION double exp_nonpositive(double x) { return ::exp(x); }

// e^x - 1 with full relative precision; 1.7e38 for x >= 88.
FD_FUNCTION float expm1(float x) {
  x = clamp(x, kExpMin, kExpMax);
#if defined(__CUDA_ARCH__)
  return expm1f(x);
#else
  float n, r, power;
  reduce(x, n, r, power);
  return (power - 1.0f) + power * (r + r * r * excess_series(r));
#endif
}

FD_FUNCTION double expm1(double x) { return ::expm1(clamp(x, -700.0, 700.0)); }

// e^x - 1, e^x - 1 - x and e^x with full relative precision, for |x| < 80: callers know that it is.
template <class T>
struct Expm1 {
  T value, excess, whole;
};

FD_FUNCTION Expm1<float> bounded_expm1(float x) {
#if defined(__CUDA_ARCH__)
  const bool small = magnitude(x) <= kHalfLn2;
  const float excess = x * x * excess_series(x), whole = exp_approx(x), value = whole - 1.0f;
  return {small ? x + excess : value, small ? excess : value - x, whole};
#else
  float n, r, power;
  reduce(x, n, r, power);
  const float excess = r * r * excess_series(r), rest = power * (r + excess);
  const float value = (power - 1.0f) + rest;
  return {value, n == 0.0f ? excess : value - x, power + rest};
#endif
}

FD_FUNCTION Expm1<double> bounded_expm1(double x) {
  const double value = ::expm1(x);
  return {value, magnitude(x) <= kHalfLn2 ? x * x * excess_series(x) : value - x, ::exp(x)};
}

// e^x - 1 and e^x, each with full relative precision; x is taken as 88 beyond (700 for doubles).
template <class T>
struct Growth {
  T less_one, whole;
};

// How far x lies beyond that, which a logarithm of what grows has to add again; 0 stays 0 times anything.
template <class T>
FD_FUNCTION T beyond_growth(T x) {
  return clamp(x - T(sizeof(T) == sizeof(float) ? kExpMax : 700.0f), T(0), T(1e4));
}

FD_FUNCTION Growth<float> growth(float x) {
  x = clamp(x, kExpMin, kExpMax);
#if defined(__CUDA_ARCH__)
  const float less_one = expm1f(x);
  return {less_one, x < -0.5f ? expf(x) : 1.0f + less_one};
#else
  float n, r, power;
  reduce(x, n, r, power);
  const float rest = power * (r + r * r * excess_series(r));
  return {(power - 1.0f) + rest, power + rest};
#endif
}

FD_FUNCTION Growth<double> growth(double x) {
  x = clamp(x, -700.0, 700.0);
  return {::expm1(x), ::exp(x)};
}

// (atanh(s) - s) / s^3 at z = s^2, its first four terms: 1/3 + z/5 + z^2/7 + z^3/9.
FD_FUNCTION float log_series(float z) {
#if defined(__CUDA_ARCH__)
  float t = 1.1111111e-1f;
  t = t * z + 1.4285714e-1f;
  t = t * z + 2.0e-1f;
  return t * z + 3.3333333e-1f;
#else
  const float low = 2.0e-1f * z + 3.3333333e-1f, high = 1.1111111e-1f * z + 1.4285714e-1f;
  return high * (z * z) + low;
#endif
}

// ln(1 + x) with full relative precision for finite x >= -1.
FD_FUNCTION float log1p(float x) {
#if defined(__CUDA_ARCH__)
  return log1pf(x);
#else
  const float u = 1.0f + x;
  const int32_t offset = 0x3f3504f3;  // sqrt(1/2): 1+x = 2^k f with f in [sqrt(1/2), sqrt(2))
  const int32_t shifted = bits<int32_t>(u) - offset;
  const int32_t k = shifted >> 23;
  const float f = bits<float>((shifted & 0x7fffff) + offset);
  const float y = k == 0 ? x : f - 1.0f;
  const float s = y / (2.0f + y), z = s * s;
  const float t = log_series(z);
  const float value = static_cast<float>(k) * kLn2 + (2.0f * s + 2.0f * s * z * t);
  return u == 0.0f ? -INFINITY : value;
#endif
}

FD_FUNCTION double log1p(double x) { return ::log1p(x); }

// y = u - 1 and u >= 0, each known with full relative precision: ln(u), and ln(u) - y/u likewise.
template <class T>
struct Log {
  T value, excess;
};

FD_FUNCTION Log<float> log_both(float y, float u) {
  const float v = y / (u < 1e-30f ? 1e-30f : u);
#if defined(__CUDA_ARCH__)
  const bool near = magnitude(y) <= 0.3f;
  const float f = near ? y : 0.0f;
#else
  const int32_t offset = 0x3f3504f3;  // sqrt(1/2): u = 2^k f with f in [sqrt(1/2), sqrt(2))
  const int32_t shifted = bits<int32_t>(u) - offset;
  const int32_t k = shifted >> 23;
  const bool near = k == 0;
  const float f = near ? y : bits<float>((shifted & 0x7fffff) + offset) - 1.0f;
#endif
  const float s = f / (2.0f + f), z = s * s;
  const float t = log_series(z);
#if defined(__CUDA_ARCH__)
  const float value = near ? 2.0f * s + 2.0f * s * z * t : logf(u);
#else
  const float log = static_cast<float>(k) * kLn2 + (2.0f * s + 2.0f * s * z * t);
  const float value = u == 0.0f ? -INFINITY : log;
#endif
  return {value, near ? s * (v + 2.0f * z * t) : value - v};
}

FD_FUNCTION Log<double> log_both(double y, double u) {
  const double value = magnitude(y) <= 0.5 ? ::log1p(y) : ::log(u), v = y / (u < 1e-300 ? 1e-300 : u);
  const double s = y / (2.0 + y), z = s * s;
  double t = 0;
  for (int n = 23; n >= 3; n -= 2) t = t * z + 1.0 / n;  // for |y| <= 1/4: z^11 is below 1e-18
  return {value, magnitude(y) <= 0.25 ? s * (v + 2.0 * z * t) : value - v};
}

// w (e^l - 1 - l) >= 0, where the caller knows gap = w (e^l - 1) exactly. 0 * inf counts as 0.
template <class T>
FD_FUNCTION T excess(T w, T gap, T l) {
  const T series = w * (l * l * excess_series(l));
  const T plain = gap - (w == T(0) ? T(0) : w * l);
  return magnitude(l) <= T(kHalfLn2) ? series : plain;
}

}  // namespace math
}  // namespace FD_ISA
}  // namespace fastdistil
