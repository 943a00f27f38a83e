// The difference of two scores in double, rounded once: for scores that agree although their factors do not, as those
// of a student that learned from scratch or whose head size is another one. The float difference of two float sums
// keeps 2^-24 of a score, and the difference is a small part of that.
//
// Work: twice that of the float products, X_s Y_s^T and X_t Y_t^T as one of depth d_s + d_t. The keys stay floats in
// their panels, half a panel is widened at a time: the conversions are an eighth of the multiply-adds.
#pragma once

#include "attention_heads.h"
#include "attention_tiles.h"

namespace fastdistil {
inline namespace FD_ISA {

// A tile of query rows in double: the student's scaled queries, then the teacher's with the sign of a difference.
class WideRows {
  std::vector<double> rows_, keys_;
  int64_t student_ = 0, stride_ = 0;

 public:
  // Rows `first` to `first + n` of those of `tokens` that count, of one head; zeros up to kTileRows.
  template <class E>
  void pack(const AttentionArgs& args, const Sequence<E>& tokens, int64_t head, int64_t first, int64_t n) {
    const Head<E> qs = tokens.of(args.student_q, head), qt = tokens.of(args.teacher_q, head);
    student_ = args.student_q.size, stride_ = student_ + args.teacher_q.size;
    rows_.assign(static_cast<size_t>(kTileRows * stride_), 0.0);
    keys_.resize(static_cast<size_t>(kTileColumns<double> * stride_));
    for (int64_t r = 0; r < n; ++r) {
      const E *s = qs.row(tokens.row(first + r)), *t = qt.row(tokens.row(first + r));
      double* row = rows_.data() + r * stride_;
      for (int64_t j = 0; j < student_; ++j) row[j] = args.student_scale * to_compute(s[j]);
      for (int64_t j = student_; j < stride_; ++j) row[j] = -args.teacher_scale * to_compute(t[j - student_]);
    }
  }

  // out[i][j], j < kTileColumns<float>: student minus teacher score of row i and the panels' key j.
  void differences(const float* student_keys, const float* teacher_keys, float* out, int64_t out_stride) {
    constexpr int64_t kColumns = kTileColumns<double>;
    for (int64_t from = 0; from < kTileColumns<float>; from += kColumns) {
      widen(student_keys + from, student_, keys_.data());
      widen(teacher_keys + from, stride_ - student_, keys_.data() + student_ * kColumns);
      double tile[kTileRows * kColumns];
      tile_product<Left::rows, false>(rows_.data(), stride_, keys_.data(), stride_, tile, kColumns);
      for (int64_t i = 0; i < kTileRows; ++i)
        for (int64_t j = 0; j < kColumns; ++j)
          out[i * out_stride + from + j] = static_cast<float>(tile[i * kColumns + j]);
    }
  }

 private:
  // A double panel from half of each row of a float one.
  static void widen(const float* panel, int64_t depth, double* out) {
    for (int64_t k = 0; k < depth; ++k, panel += kTileColumns<float>, out += kTileColumns<double>)
      for (int64_t j = 0; j < kTileColumns<double>; ++j) out[j] = panel[j];
  }
};

}  // namespace FD_ISA
}  // namespace fastdistil
