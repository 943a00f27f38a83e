// What the kernels over rows of logits share: element types, packs of 16 bytes, and sums over warps.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../csrc/rules/logit_args.h"
#include "../../csrc/rules/pair.h"

namespace fastdistil {
namespace {

template <class E>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class E>
using Compute = typename ComputeOf<E>::type;

__device__ inline float to_compute(float x) { return x; }
__device__ inline double to_compute(double x) { return x; }
__device__ inline float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_compute(__half x) { return __half2float(x); }
__device__ inline void from_compute(float x, float& y) { y = x; }
__device__ inline void from_compute(double x, double& y) { y = x; }
__device__ inline void from_compute(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void from_compute(float x, __half& y) { y = __float2half_rn(x); }

template <class E>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(E);
  E element[size];
};

// Elements from p to the next multiple of 16 bytes.
template <class E>
__device__ int ahead(const E* p) {
  return static_cast<int>((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(E));
}

// Masses of a part of a row (csrc/rules/pair.h); `far` is 1 where a column of it lies too far from the teacher's.
template <class T>
struct Part {
  T max, reference, far;
  double sum, difference;
};

template <class T>
__device__ T larger(T a, T b) {
  return a > b ? a : b;
}

// Sum and difference of a part, in the unit of all parts' maximum and relative to the reference that goes with it.
template <class T>
__device__ Mass<double> moved(Part<T> own, T max, T reference) {
  Masses<T, double> masses{own.max, own.reference, own.sum, own.difference};
  masses.move(max > T(-INFINITY) ? max : T(0), reference);
  return {masses.sum, masses.difference};
}

template <class T, class Combine>
__device__ T combine_lanes(T x, Combine&& combine) {
  for (int offset = 16; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
__device__ inline double sum_lanes(double x) {
  return combine_lanes(x, [](double a, double b) { return a + b; });
}

// The whole of the warp's parts, for every lane.
template <class T>
__device__ Part<T> merge_lanes(Part<T> own) {
  const T max = combine_lanes(own.max, larger<T>);
  const T reference = combine_lanes(own.max == max ? own.reference : T(-INFINITY), larger<T>);
  const Mass<double> part = moved(own, max, reference);
  return {max, reference, combine_lanes(own.far, larger<T>), sum_lanes(part.sum), sum_lanes(part.difference)};
}

template <class T>
__device__ Tempering<T> tempering_of(const LogitArgs& args) {
  return {static_cast<T>(1.0 / args.student_temperature), static_cast<T>(1.0 / args.teacher_temperature),
          args.student_temperature == args.teacher_temperature, T(0)};
}

}  // namespace
}  // namespace fastdistil
