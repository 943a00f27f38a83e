// Keys as the tiled attention kernel wants them: transposed, in panels.
#pragma once

#include "attention_heads.h"
#include "attention_tiles.h"

namespace fastdistil {
inline namespace FD_ISA {

constexpr double kFar = 0.5;  // |K_s - K_t| / |K_t|: from here on c keeps its digits without the exact form

// Whether the difference is worth its own product: where the keys lie far apart, subtracting the student's and the
// teacher's scores loses nothing, and the exact form would cost a quarter more.
template <class E>
bool near(const Sequence<E>& tokens, const Head<E>& ks, const Head<E>& kt, int64_t size_of_head) {
  using T = Compute<E>;
  T distance = 0, size = 0;
  for (int64_t k = 0; k < tokens.n_keys(); ++k) {
    const E *s = ks.row(tokens.key(k)), *t = kt.row(tokens.key(k));
#pragma omp simd reduction(+ : distance, size)
    for (int64_t j = 0; j < size_of_head; ++j) {
      const T x = to_compute(s[j]), y = to_compute(t[j]);
      distance += (x - y) * (x - y), size += y * y;
    }
  }
  return !(distance > T(kFar * kFar) * size);
}

// One panel: keys `first` to `first + kTileColumns`, zeros behind the last one.
template <class E, class T>
void transpose_keys(const Sequence<E>& tokens, const Head<E>& head, int64_t first, int64_t size, T* panel) {
  constexpr int n = kLanes<T>;
  constexpr int64_t kColumns = kTileColumns<T>;
  alignas(64) T square[n][n], turned[n][n];
  for (int64_t k = 0; k < kColumns; k += n)
    for (int64_t j = 0; j < size; j += n) {
      const int64_t width = std::min<int64_t>(n, size - j);
      for (int i = 0; i < n; ++i) {
        std::fill_n(square[i], n, T(0));
        if (first + k + i >= tokens.n_keys()) continue;
        const E* row = head.row(tokens.key(first + k + i)) + j;
        if (width == n)
#pragma omp simd
          for (int l = 0; l < n; ++l) square[i][l] = to_compute(row[l]);
        else
          for (int64_t l = 0; l < width; ++l) square[i][l] = to_compute(row[l]);
      }
      if (width == n) {
        transpose<T>(square, panel + j * kColumns + k, kColumns);
        continue;
      }
      transpose<T>(square, turned[0], n);
      for (int64_t l = 0; l < width; ++l) std::copy_n(turned[l], n, panel + (j + l) * kColumns + k);
    }
}

}  // namespace FD_ISA
}  // namespace fastdistil
