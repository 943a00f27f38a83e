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

// Masses of a part of a row, relative to the unit of its maximum (csrc/rules/pair.h, Masses).
struct Part {
  double max, sum, difference;
};

__device__ inline double unit_of(double max) { return max > -INFINITY ? max : 0.0; }

// 0 stays 0: a part without mass may lie infinitely far from the unit.
__device__ inline double scaled(double x, double factor) { return x == 0 ? 0.0 : x * factor; }

template <class Combine>
__device__ double combine_lanes(double x, Combine&& combine) {
  for (int offset = 16; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
__device__ inline double sum_lanes(double x) {
  return combine_lanes(x, [](double a, double b) { return a + b; });
}

// The whole of the warp's parts, for every lane.
__device__ inline Part merge_lanes(Part own) {
  const double max = combine_lanes(own.max, [](double a, double b) { return a > b ? a : b; });
  const double factor = ::exp(unit_of(own.max) - unit_of(max));
  return {max, sum_lanes(scaled(own.sum, factor)), sum_lanes(scaled(own.difference, factor))};
}

template <class T>
__device__ Tempering<T> tempering_of(const LogitArgs& args) {
  return {static_cast<T>(1.0 / args.student_temperature), static_cast<T>(1.0 / args.teacher_temperature),
          args.student_temperature == args.teacher_temperature, T(0)};
}

}  // namespace
}  // namespace fastdistil
