// The label's part of a row of logits: the cross entropy that logit.cpp adds to a divergence.
#pragma once

#include "index.h"
#include "logit_block.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

// The cross entropy of a row with its label, times `scale`. Where the row is sure of its label, p - 1 there and ln p
// are what all other columns say. A label that is no column makes the row's loss and gradient NaN.
template <class T>
class Label {
  int64_t column_;
  T max_, factor_, slope_, value_;  // the largest logit; scale / sum of exp(z - max); the gradient at the label

 public:
  Label(const Row<T>& row, int64_t column, T scale, Block<T>& block) : column_(column) {
    LogSum<T> found;
    for (int64_t begin = 0; begin < row.columns; begin += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(row.columns - begin, kBlock));
      found.add(own_logits(row, begin, n, block), n, T(1));
    }
    const bool there = inside(column, row.columns);
    const T z = there ? *own_logits(row, column, 1, block) : static_cast<T>(NAN);
    max_ = found.max, factor_ = there ? static_cast<T>(scale / found.sum()) : z;
    slope_ = static_cast<T>(scale * found.slope(z));
    value_ = static_cast<T>(scale * (found.log() + (max_ - z)));
  }

  T value() const { return value_; }

  // Adds the gradient of the n columns from `begin` on.
  void add(const T* logits, int64_t begin, int n, T* sum) const {
    const bool here = column_ >= begin && column_ < begin + n;
    const T there = here ? sum[column_ - begin] + slope_ : T(0);
#pragma omp simd
    for (int i = 0; i < n; ++i) sum[i] += factor_ * math::exp_nonpositive(logits[i] - max_);
    if (here) sum[column_ - begin] = there;
  }
};

}  // namespace
}  // namespace FD_ISA
}  // namespace fastdistil
