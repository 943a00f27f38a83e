// Matrix products of one thread, a register tile at a time, on operands packed so that no tile has an edge.
//
// A tile is kTileRows x kTileColumns<T> of the result: 16 accumulators for AVX-512, 8 for AVX2 and SSE, enough to hide
// the latency of the multiply-adds and few enough to stay in registers. Panels hold a matrix as
// [columns / kTileColumns][rows][kTileColumns], so that the inner loop reads them in order.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../rules/math.h"

namespace fastdistil {
inline namespace FD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 4;
#else
constexpr int kVectorBytes = 16, kTileRows = 4;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
constexpr int kTileColumns = 2 * kLanes<T>;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
inline Vector<T> load(const T* from) {
  Vector<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
inline void store(T* to, Vector<T> x) {
  std::memcpy(to, &x, sizeof x);
}

enum class Left { rows, columns };  // element (i, k) at left[i * stride + k], or at left[k * stride + i]

// out[i][j] = (kAdd: its old value plus) the sum over k < depth of left(i, k) * panel[k][j]. On its own, because the
// eight addresses of a step do not stay in registers where GCC inlines it into a larger function.
template <Left kLeft, bool kAdd, class T>
__attribute__((noinline)) void tile_product(const T* left, int64_t left_stride, const T* panel, int64_t depth, T* out,
                                            int64_t out_stride) {
  Vector<T> low[kTileRows] = {}, high[kTileRows] = {};
  for (int64_t k = 0; k < depth; ++k, panel += kTileColumns<T>) {
    const Vector<T> p = load(panel), q = load(panel + kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const T x = kLeft == Left::rows ? left[i * left_stride + k] : left[k * left_stride + i];
      low[i] += x * p;
      high[i] += x * q;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i, out += out_stride) {
    store<T>(out, kAdd ? load(out) + low[i] : low[i]);
    store<T>(out + kLanes<T>, kAdd ? load(out + kLanes<T>) + high[i] : high[i]);
  }
}

template <class T>
struct Lanes {  // the lane numbers of a shuffle
  typedef std::conditional_t<sizeof(T) == 8, int64_t, int32_t> index;
  typedef index type __attribute__((vector_size(kVectorBytes)));
};

// Two vectors whose off-diagonal blocks of kHalf lanes change places.
template <int kHalf, class T>
inline void swap_blocks(Vector<T>& upper, Vector<T>& lower) {
  constexpr int n = kLanes<T>;
#if defined(__clang__)  // whose shuffle wants its lanes as arguments; it finds them in this loop
  const Vector<T> u = upper, l = lower;
  for (int i = 0; i < n; ++i) {
    upper[i] = i & kHalf ? l[i - kHalf] : u[i];
    lower[i] = i & kHalf ? l[i] : u[i + kHalf];
  }
#else
  typename Lanes<T>::type first, second;
  for (int i = 0; i < n; ++i) {
    first[i] = i & kHalf ? n + i - kHalf : i;
    second[i] = i & kHalf ? n + i : i + kHalf;
  }
  const Vector<T> u = upper, l = lower;
  upper = __builtin_shuffle(u, l, first);
  lower = __builtin_shuffle(u, l, second);
#endif
}

// out[j * out_stride + i] = block[i][j], a square as wide as a vector.
template <class T>
inline void transpose(const T (&block)[kLanes<T>][kLanes<T>], T* out, int64_t out_stride) {
  constexpr int n = kLanes<T>;
  Vector<T> x[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) x[i] = load(block[i]);
  const auto stage = [&](auto half) {
    constexpr int h = decltype(half)::value;
    if constexpr (h < n) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i)
        if (!(i & h)) swap_blocks<h, T>(x[i], x[i + h]);
    }
  };
  stage(std::integral_constant<int, 8>{}), stage(std::integral_constant<int, 4>{});
  stage(std::integral_constant<int, 2>{}), stage(std::integral_constant<int, 1>{});
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store<T>(out + i * out_stride, x[i]);
}

// Row `index` of a matrix that is kept as panels of `rows` rows: columns from source, zeros behind them.
template <class T, class Source>
inline void set_panel_row(T* panels, int64_t rows, int64_t index, int64_t columns, Source&& source) {
  for (int64_t begin = 0; begin < columns; begin += kTileColumns<T>) {
    T* row = panels + begin * rows + index * kTileColumns<T>;
    const int64_t n = columns - begin < kTileColumns<T> ? columns - begin : kTileColumns<T>;
    if (n == kTileColumns<T>)
      for (int64_t j = 0; j < kTileColumns<T>; ++j) row[j] = source(begin + j);
    else
      for (int64_t j = 0; j < n; ++j) row[j] = source(begin + j);
    for (int64_t j = n; j < kTileColumns<T>; ++j) row[j] = T(0);
  }
}

}  // namespace FD_ISA
}  // namespace fastdistil
