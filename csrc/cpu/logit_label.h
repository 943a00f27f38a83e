// The label's part of a row of logits: the cross entropy that logit.cpp adds to a divergence.
#pragma once

#include "logit_block.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

// The cross entropy of a row with its label, times `scale`.
template <class T>
class Label {
  int64_t column_;
  T max_, factor_, scale_, value_;  // the largest logit, scale / sum of exp(z - max)

 public:
  Label(const Row<T>& row, int64_t column, T scale, Block<T>& block) : column_(column), scale_(scale) {
    LogSum<T> found;
    for (int64_t begin = 0; begin < row.columns; begin += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(row.columns - begin, kBlock));
      found.add(own_logits(row, begin, n, block), n, T(1));
    }
    max_ = found.max, factor_ = static_cast<T>(scale / found.sum);
    value_ = static_cast<T>(scale * (std::log(found.sum) + (max_ - *own_logits(row, column, 1, block))));
  }

  T value() const { return value_; }

  // Adds the gradient of the n columns from `begin` on.
  void add(const T* logits, int64_t begin, int n, T* sum) const {
#pragma omp simd
    for (int i = 0; i < n; ++i) sum[i] += factor_ * math::exp_nonpositive(logits[i] - max_);
    if (column_ >= begin && column_ < begin + n) sum[column_ - begin] -= scale_;
  }
};

}  // namespace
}  // namespace FD_ISA
}  // namespace fastdistil
