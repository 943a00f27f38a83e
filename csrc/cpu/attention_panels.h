// Keys as the tiled attention kernel wants them: transposed, in panels, and without what they have in common.
//
// A vector common to all keys, such as the bias of a key projection, adds q . vector to every score of a row, which a
// softmax does not see. What it does see is the rest, of which a large common part leaves float few digits: so the mean
// is taken off the student's keys, the teacher's and their difference, each by itself, where it is not small.
#pragma once

#include "attention_heads.h"
#include "attention_tiles.h"

namespace fastdistil {
inline namespace FD_ISA {

// One panel: keys `first` to `first + kTileColumns`, zeros behind the last one.
template <class T>
void transpose_keys(const Sequence<T>& tokens, const Head<T>& head, int64_t first, int64_t size, T* panel) {
  constexpr int n = kLanes<T>;
  static_assert(n <= Head<T>::kRows);
  constexpr int64_t kColumns = kTileColumns<T>;
  alignas(64) T square[n][n], turned[n][n];
  for (int64_t k = 0; k < kColumns; k += n) {
    const T* rows[n] = {};
    for (int i = 0; i < n && first + k + i < tokens.n_keys(); ++i) rows[i] = head.row(tokens.key(first + k + i), i);
    for (int64_t j = 0; j < size; j += n) {
      const int64_t width = std::min<int64_t>(n, size - j);
      for (int i = 0; i < n; ++i) {
        if (width < n || !rows[i]) std::fill_n(square[i], n, T(0));
        if (rows[i]) std::copy_n(rows[i] + j, width == n ? n : width, square[i]);
      }
      if (width == n) {
        transpose<T>(square, panel + j * kColumns + k, kColumns);
        continue;
      }
      transpose<T>(square, turned[0], n);
      for (int64_t l = 0; l < width; ++l) std::copy_n(turned[l], n, panel + (j + l) * kColumns + k);
    }
  }
}

constexpr double kFar = 0.5;      // |K_s - K_t| / |K_t|: from here on c keeps its digits without the exact form
constexpr double kCommon = 0.25;  // of a mean's square, in units of the variance: what is less is left where it is

// x - y - mean, rounded once where x - y is near the mean, however small what remains.
template <class T>
inline T difference(T x, T y, T mean) {
  const T d = x - y, back = x - d;
  return (d - mean) + ((x - (d + back)) + (back - y));
}

template <class T>
inline void add_panels(const T* panel, int64_t stride, int64_t panels, T& sum, T& square) {
  Vector<T> low = {}, high = {}, low2 = {}, high2 = {};
  for (int64_t k = 0; k < panels; ++k, panel += stride) {
    const Vector<T> x = load(panel), y = load(panel + kLanes<T>);
    low += x, high += y, low2 += x * x, high2 += y * y;
  }
  low += high, low2 += high2;
  sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += low[i], square += low2[i];
}

// The same of the difference of two.
template <class T>
inline void add_differences(const T* one, int64_t stride, const T* other, int64_t other_stride, int64_t panels, T& sum,
                            T& square) {
  Vector<T> low = {}, high = {}, low2 = {}, high2 = {};
  for (int64_t k = 0; k < panels; ++k, one += stride, other += other_stride) {
    const Vector<T> x = load(one) - load(other), y = load(one + kLanes<T>) - load(other + kLanes<T>);
    low += x, high += y, low2 += x * x, high2 += y * y;
  }
  low += high, low2 += high2;
  sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += low[i], square += low2[i];
}

// Sums to means; whether they are worth taking off, and the squares of what remains then.
template <class T>
inline bool find_means(T* sums, int64_t size, T keys, T& square) {
  T common = 0;
  for (int64_t j = 0; j < size; ++j) sums[j] /= keys, common += sums[j] * sums[j];
  const T rest = square - keys * common;
  if (keys * common > T(kCommon) * rest && common < T(1e30)) {
    square = rest > T(0) ? rest : T(0);
    return true;
  }
  std::fill_n(sums, size, T(0));  // among them what is not finite
  return false;
}

}  // namespace FD_ISA
}  // namespace fastdistil
