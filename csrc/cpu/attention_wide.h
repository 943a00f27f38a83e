// The difference of two scores in double, rounded once: for scores that agree although their factors do not, as those
// of a student that learned from scratch or whose head size is another one. The float difference of two float sums
// keeps 2^-24 of a score, and the difference is a small part of that.
//
// Work: twice that of the float products, X_s Y_s^T and X_t Y_t^T as one of depth d_s + d_t. The keys stay floats in
// panels, half a panel is widened at a time: the conversions are an eighth of the multiply-adds. What the mean of all
// keys adds to a row, which a softmax does not see, is taken off before the rounding.
#pragma once

#include "attention_heads.h"
#include "attention_panels.h"
#include "attention_tiles.h"

namespace fastdistil {
inline namespace FD_ISA {

// The keys of a head, the student's and the teacher's, and a tile of query rows in double: the student's scaled
// queries, then the teacher's with the sign of a difference.
class WideRows {
  std::vector<float> panels_;
  std::vector<double> rows_, keys_, means_;
  double of_mean_[kTileRows] = {};
  int64_t student_ = 0, stride_ = 0;

 public:
  void pack_keys(const AttentionArgs& args, const Sequence<float>& tokens, int64_t head_s, int64_t head_t,
                 bool softmax) {
    constexpr int64_t kColumns = kTileColumns<float>;
    const Head<float> ks = tokens.of(args.student_k, head_s), kt = tokens.of(args.teacher_k, head_t);
    student_ = args.student_k.size, stride_ = student_ + args.teacher_k.size;
    panels_.resize(static_cast<size_t>(round_up(tokens.n_keys(), kColumns) * stride_));
    for (int64_t k = 0; k < tokens.n_keys(); k += kColumns) {
      float* panel = panels_.data() + k * stride_;
      transpose_keys(tokens, ks, k, student_, panel);
      transpose_keys(tokens, kt, k, stride_ - student_, panel + student_ * kColumns);
    }
    means_.assign(static_cast<size_t>(stride_), 0.0);
    for (int64_t k = 0; softmax && k < tokens.n_keys(); ++k) {
      const float *s = ks.row(tokens.key(k)), *t = kt.row(tokens.key(k));
      for (int64_t j = 0; j < student_; ++j) means_[static_cast<size_t>(j)] += s[j];
      for (int64_t j = student_; j < stride_; ++j) means_[static_cast<size_t>(j)] += t[j - student_];
    }
    for (double& mean : means_) {
      mean /= static_cast<double>(tokens.n_keys());
      if (!std::isfinite(mean)) mean = 0;
    }
  }

  // Rows `first` to `first + n` of those of `tokens` that count, of one head; zeros up to kTileRows.
  void pack(const AttentionArgs& args, const Sequence<float>& tokens, int64_t head, int64_t first, int64_t n) {
    const Head<float> qs = tokens.of(args.student_q, head), qt = tokens.of(args.teacher_q, head);
    rows_.assign(static_cast<size_t>(kTileRows * stride_), 0.0);
    keys_.resize(static_cast<size_t>(kTileColumns<double> * stride_));
    std::fill_n(of_mean_, kTileRows, 0.0);
    for (int64_t r = 0; r < n; ++r) {
      const float *s = qs.row(tokens.row(first + r)), *t = qt.row(tokens.row(first + r));
      double* row = rows_.data() + r * stride_;
      for (int64_t j = 0; j < student_; ++j) row[j] = args.student_scale * s[j];
      for (int64_t j = student_; j < stride_; ++j) row[j] = -args.teacher_scale * t[j - student_];
      for (int64_t j = 0; j < stride_; ++j) of_mean_[r] += row[j] * means_[static_cast<size_t>(j)];
    }
  }

  // out[i][j], j < kTileColumns<float>: student minus teacher score of row i and key first + j, but for the mean's.
  void differences(int64_t first, float* out, int64_t out_stride) {
    constexpr int64_t kColumns = kTileColumns<double>;
    const float* panel = panels_.data() + first * stride_;
    for (int64_t from = 0; from < kTileColumns<float>; from += kColumns) {
      widen(panel + from, stride_, keys_.data());
      double tile[kTileRows * kColumns];
      tile_product<Left::rows, false>(rows_.data(), stride_, keys_.data(), stride_, tile, kColumns);
      for (int64_t i = 0; i < kTileRows; ++i)
        for (int64_t j = 0; j < kColumns; ++j)
          out[i * out_stride + from + j] = static_cast<float>(tile[i * kColumns + j] - of_mean_[i]);
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
