// A row pair of logits as blocks of scores: what the passes of logit.cpp loop over.
#pragma once

#include <algorithm>

#include "../rules/pair.h"
#include "elements.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

constexpr int kBlock = 512;  // columns: five float blocks stay in L1
constexpr int kLanes = 16;   // floats of the widest vector: blocks are padded to a multiple, so that no loop has a tail

template <class E>
struct Row {
  using T = Compute<E>;
  const E* student;
  const E* teacher;
  int64_t columns;
  Tempering<T> tempering;
  RowStats<T> stats;
};

template <class E>
struct Block {
  using T = Compute<E>;
  T a[kBlock], b[kBlock], d[kBlock];
  T student[kBlock], teacher[kBlock];
  E tail[kBlock];      // a padded block's gradient
  T staged[kBlock];    // a gradient to which something is added before it is rounded
  const T* logits;     // the student's, as they are
  bool near;           // every |d| is small
  bool whole = false;  // what is loaded is all of the row that is worked on

  // Returns how many columns there are now; those behind the row's end have no mass on either side.
  int load(const Row<E>& row, int64_t begin, int n) {
    const T* zs = load_block(row.student + begin, student, n);
    const T* zt = load_block(row.teacher + begin, teacher, n);
    const int padded = pad(zs, zt, n);
    logits = zs;
    near = row.tempering.equal ? temper<true>(row.tempering, zs, zt, padded)
                               : temper<false>(row.tempering, zs, zt, padded);
    whole = n == row.columns;
    return padded;
  }

 private:
  int pad(const T*& zs, const T*& zt, int n) {
    const int padded = (n + kLanes - 1) / kLanes * kLanes;
    if (padded == n) return n;
    if (zs != student) std::copy(zs, zs + n, student), std::copy(zt, zt + n, teacher);
    for (int i = n; i < padded; ++i) student[i] = teacher[i] = -INFINITY;
    zs = student, zt = teacher;
    return padded;
  }

  template <bool kEqual>
  bool temper(const Tempering<T>& row, const T* zs, const T* zt, int n) {
    const Tempering<T> tempering{row.inv_student, row.inv_teacher, kEqual, row.shift};
    int far = 0;
#pragma omp simd reduction(| : far)
    for (int i = 0; i < n; ++i) {
      const Scores<T> c = scores(zs[i], zt[i], tempering);
      a[i] = c.a, b[i] = c.b, d[i] = c.d;
      far |= !(math::magnitude(c.d) <= T(kNear));
    }
    return far == 0;
  }
};

// action(begin, padded columns, columns); a row of one block is loaded once.
template <class E, class Action>
void for_blocks(const Row<E>& row, Block<E>& block, Action&& action) {
  for (int64_t begin = 0; begin < row.columns; begin += kBlock) {
    const int n = static_cast<int>(row.columns - begin < kBlock ? row.columns - begin : kBlock);
    const int padded = block.whole ? (n + kLanes - 1) / kLanes * kLanes : block.load(row, begin, n);
    action(begin, padded, n);
  }
}

template <class T>
T block_max(const T* x, int n) {
  T largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fastdistil
