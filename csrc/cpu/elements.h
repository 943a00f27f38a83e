// Rows of any floating dtype as blocks of the type that is computed in, and back. Every loop vectorises.
#pragma once

#include <type_traits>

#include "../rules/math.h"

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

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

#if defined(__AVX2__) && defined(__F16C__)
// Eight at once; what a compiler makes of the functions above takes twice as long.
inline __m256 to_compute(const bf16* x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline __m256 to_compute(const f16* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }

inline __m128i from_compute(__m256 x, bf16) {
  const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q), quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256i rounded = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(sum), quiet, nan));
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i from_compute(__m256 x, f16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#define FD_EIGHT_AT_ONCE
#endif

// A block's elements as Compute<E>: in place for the compute type itself, else converted into `buffer`.
template <class E>
inline const Compute<E>* load_block(const E* source, Compute<E>* buffer, int n) {
  if constexpr (std::is_same_v<E, Compute<E>>) {
    return source;
  } else {
    int i = 0;
#if defined(FD_EIGHT_AT_ONCE)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(buffer + i, to_compute(source + i));
#endif
    for (; i < n; ++i) buffer[i] = to_compute(source[i]);
    return buffer;
  }
}

// And back; rounding is to nearest, ties to even.
template <class E>
inline void store_block(const Compute<E>* from, E* to, int n) {
  int i = 0;
#if defined(FD_EIGHT_AT_ONCE)
  if constexpr (!std::is_same_v<E, Compute<E>>)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), from_compute(_mm256_loadu_ps(from + i), E{}));
#endif
  for (; i < n; ++i) to[i] = from_compute<E>(from[i]);
}

}  // namespace FD_ISA
}  // namespace fastdistil
