// Losses between two attention maps, value and gradient, a block of query rows at a time (docs/losses.md, section 4).
//
// Work: S^2 d multiply-adds a head for the teacher's scores, 2 S^2 d for the exact difference (S^2 d where the keys lie
// far apart or the head sizes differ; score_mse needs the difference alone), 2 S^2 d for the two gradients; the rule
// itself is about 45 operations an entry. So the floor is 8 to 10 B H S^2 d operations over the multiply-add rate. A
// block of scores stays in a core's L2 cache, the maps are never whole. Scores that turn out to agree although their
// factors do not are subtracted in double from then on (attention_wide.h), in all at 1.6 to 1.9 times the time.
//
// A softmax does not see what all keys have in common: see attention_panels.h.
//
// Padding costs nothing: hidden keys and query rows of scale 0 are left out where the operands are packed, so that the
// products and the rule see dense rows.
//
// Compiled once an instruction set (FD_ISA); dispatch.cpp chooses at run time.
#include "attention_heads.h"
#include "attention_panels.h"
#include "attention_rows.h"
#include "attention_wide.h"
#include "attention_workspace.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

// Where the scores' difference is a smaller part of one of the two products that make it, the float product has lost
// five bits of it and more.
constexpr double kSmallest = 1.0 / 32;

template <class T>
class Kernel {
  static constexpr int64_t kColumns = kTileColumns<T>;
  static constexpr bool kMayCancel = std::is_same_v<T, float>;
  const AttentionArgs& args_;
  const Shape shape_;
  const T scale_s_, scale_t_;
  const bool scores_;  // score_mse: b alone, the difference [X_s, -X_t] [Y_s, Y_t]^T or its exact form
  Workspace<T> w_{};
  bool exact_ = false;   // of the keys that are packed: the difference is [X_s - X_t, X_t] [Y_s, Y_s - Y_t]^T
  bool wide_ = false;    // or is formed in double, from one tile of their rows on
  bool packed_ = false;  // whether wide_rows_ has the keys
  int64_t inner_ = 0;    // depth of the student's product
  int64_t head_s_ = 0, head_t_ = 0;
  T key_size_ = 0;      // mean square of an element of the student's
  bool moved_ = false;  // whether the student's keys are without their mean, the first of w_.means
  bool dk_begun_ = false;
  WideRows wide_rows_;

 public:
  Kernel(const AttentionArgs& args, const Shape& shape, T* memory)
      : args_(args),
        shape_(shape),
        scale_s_(static_cast<T>(args.student_scale)),
        scale_t_(static_cast<T>(args.teacher_scale)),
        scores_(args.kind == AttentionKind::score_mse) {
    w_.lay_out(shape, memory);
  }

  void run(const Item& item, const Item& next) {
    Sequence<T> tokens(args_, item.sequence);
    Ahead ahead(args_, next);
    const int64_t key_head = item.key_head;
    const int64_t group_s = args_.student_q.heads / args_.student_k.heads;
    const int64_t group_t = args_.teacher_q.heads / args_.teacher_k.heads;
    int64_t packed = -1;  // the teacher's key head
    dk_begun_ = false;
    for (int64_t h = key_head * group_s; h < (key_head + 1) * group_s; ++h) {
      tokens.select_rows(h);
      if (tokens.n_rows() == 0) continue;
      if (packed != h / group_t) {
        head_s_ = key_head, head_t_ = packed = h / group_t, wide_ = packed_ = false;
        pack_keys(tokens);
      }
      for (int64_t begin = 0; begin < tokens.n_rows(); begin += shape_.block)
        block(tokens, ahead, h, begin, std::min(shape_.block, tokens.n_rows() - begin));
    }
    if (!args_.dk) return;
    tokens.clear_dk(key_head, !dk_begun_);
    for (int64_t k = 0; dk_begun_ && k < tokens.n_keys(); ++k)
      std::copy_n(w_.dk + k * shape_.columns, shape_.student, tokens.dk(key_head) + tokens.key(k) * shape_.student);
  }

 private:
  // Keys as panels: transposed for the scores, as they are for dq.
  void pack_keys(const Sequence<T>& tokens) {
    const Head<T> ks = tokens.of(args_.student_k, head_s_), kt = tokens.of(args_.teacher_k, head_t_);
    const int64_t depth = shape_.student * kColumns;
    for (int64_t k = 0; k < tokens.n_keys(); k += kColumns) {
      transpose_keys(tokens, kt, k, shape_.teacher, teacher_panel(k));
      transpose_keys(tokens, ks, k, shape_.student, student_panel(k));
    }
    T* const means = w_.means;
    if (scores_) {
      exact_ = shape_.student == shape_.teacher, key_size_ = 0;
      for (int64_t k = 0; k < tokens.n_keys(); k += kColumns) {
        T *student = student_panel(k), *teacher = teacher_panel(k);
        key_size_ += squares(student, depth);
        for (int64_t j = 0; exact_ && j < depth; ++j) teacher[j] = student[j] - teacher[j];
      }
    } else {
      take_means_off(tokens.n_keys());
    }
    inner_ = exact_ || scores_ ? shape_.student + shape_.teacher : shape_.student;
    key_size_ /= static_cast<T>(shape_.student * tokens.n_keys());
    for (int64_t k = 0; args_.dq && k < tokens.n_keys(); ++k) {
      const T* s = ks.row(tokens.key(k));
      if (moved_)
        set_panel_row(w_.key_panels, shape_.keys, k, shape_.student, [s, means](int64_t j) { return s[j] - means[j]; });
      else
        set_panel_row(w_.key_panels, shape_.keys, k, shape_.student, [s](int64_t j) { return s[j]; });
    }
  }

  // What a softmax does not see off the panels' keys; their difference behind the student's, if it is to be exact.
  void take_means_off(int64_t n_keys) {
    const int64_t size = shape_.student, depth = size * kColumns, panels = (n_keys + kColumns - 1) / kColumns;
    const int64_t stride = shape_.inner * kColumns, other = shape_.teacher * kColumns;
    const T keys = static_cast<T>(n_keys);
    T *mean = w_.means, *between = mean + size, *others = between + size;
    T square = 0, distance = 0, teacher_square = 0;
    for (int64_t j = 0; j < size; ++j) add_panels(w_.student_keys + j * kColumns, stride, panels, mean[j], square);
    for (int64_t j = 0; j < shape_.teacher; ++j)
      add_panels(w_.teacher_keys + j * kColumns, other, panels, others[j], teacher_square);
    moved_ = find_means(mean, size, keys, square);
    const bool teacher_moves = find_means(others, shape_.teacher, keys, teacher_square);
    exact_ = false;
    bool apart = false;
    if (size == shape_.teacher) {
      for (int64_t j = 0; j < size; ++j)
        add_differences(w_.student_keys + j * kColumns, stride, w_.teacher_keys + j * kColumns, other, panels,
                        between[j], distance);
      apart = find_means(between, size, keys, distance);
      exact_ = !(distance > T(kFar * kFar) * teacher_square);
    }
    key_size_ = moved_ ? T(0) : square;
    if (!exact_ && !moved_ && !teacher_moves) return;
    for (int64_t k = 0; k < n_keys; k += kColumns) {
      T *student = student_panel(k), *teacher = teacher_panel(k), *behind = student + depth;
      if (exact_ && apart)
        for_panel(size, [=](int64_t j, int64_t i) { behind[i] = difference(student[i], teacher[i], between[j]); });
      else if (exact_)
        for_panel(size, [=](int64_t, int64_t i) { behind[i] = student[i] - teacher[i]; });
      if (moved_) {
        for_panel(size, [=](int64_t j, int64_t i) { student[i] -= mean[j]; });
        key_size_ += squares(student, depth);
      }
      if (teacher_moves) for_panel(shape_.teacher, [=](int64_t j, int64_t i) { teacher[i] -= others[j]; });
    }
  }

  template <class Visit>
  static void for_panel(int64_t size, Visit&& visit) {
    for (int64_t j = 0; j < size; ++j)
#pragma omp simd
      for (int64_t i = j * kColumns; i < (j + 1) * kColumns; ++i) visit(j, i);
  }

  T* student_panel(int64_t key) const { return w_.student_keys + key * shape_.inner; }

  // Where the teacher's keys from `key` on are, or, for score_mse's exact form, their difference.
  T* teacher_panel(int64_t key) const {
    return scores_ ? student_panel(key) + shape_.student * kColumns : w_.teacher_keys + key * shape_.teacher;
  }

  // Query rows: the student's left factor, then the teacher's; and as panels for dk.
  void pack_rows(const Sequence<T>& tokens, int64_t head, int64_t begin, int64_t n) {
    const Head<T> qs = tokens.of(args_.student_q, head), qt = tokens.of(args_.teacher_q, head);
    const T own = scale_s_, rest = exact_ ? -scale_t_ : T(0);
    for (int64_t r = 0; r < round_up(n, kTileRows); ++r) {
      T *student = w_.left + r * shape_.left, *teacher = student + shape_.student;
      if (r >= n) {
        std::fill_n(student, shape_.left, T(0));
        continue;
      }
      const T *s = qs.row(tokens.row(begin + r)), *t = qt.row(tokens.row(begin + r));
      if (exact_ && own == -rest)
        for (int64_t j = 0; j < shape_.student; ++j) student[j] = own * (s[j] - t[j]);
      else if (exact_)
        for (int64_t j = 0; j < shape_.student; ++j) student[j] = own * (s[j] - t[j]) + (own + rest) * t[j];
      else
        for (int64_t j = 0; j < shape_.student; ++j) student[j] = own * s[j];
      const T others = scores_ && !exact_ ? -scale_t_ : scale_t_;
      for (int64_t j = 0; j < shape_.teacher; ++j) teacher[j] = others * t[j];
      if (args_.dk) set_panel_row(w_.query_panels, shape_.block, r, shape_.student, [s](int64_t j) { return s[j]; });
    }
  }

  void block(const Sequence<T>& tokens, Ahead& ahead, int64_t head, int64_t begin, int64_t n) {
    pack_rows(tokens, head, begin, n);
    const int64_t width = tokens.sees(begin + n - 1);  // no row sees more than the last one
    for (int64_t r = 0; r < n; r += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, n - r);
      find_scores(tokens, ahead, head, begin, r, rows);
      if (finish_rows(tokens, head, begin, r, rows, width)) {
        wide_ = true;
        find_scores(tokens, ahead, head, begin, r, rows);
        finish_rows(tokens, head, begin, r, rows, width);
      }
      if (args_.dq) write_dq(tokens, head, begin, r, rows);
    }
    if (args_.dk) add_dk(tokens, begin, n, width);
  }

  // One tile: the difference of the scores in b for score_mse, else in c (that or the student's), the teacher's in b.
  void find_scores(const Sequence<T>& tokens, Ahead& ahead, int64_t head, int64_t begin, int64_t first, int64_t n) {
    const int64_t sees = tokens.sees(begin + first + n - 1);
    const T* left = w_.left + first * shape_.left;
    T *b = w_.b + first * shape_.stride, *c = scores_ ? b : w_.c;
    if (wide_) wide_differences(tokens, head, begin + first, n, c);
    for (int64_t k = 0; k < sees; k += kColumns) {
      ahead.fetch(2);
      if (!wide_) tile_product<Left::rows, false>(left, shape_.left, student_panel(k), inner_, c + k, shape_.stride);
      if (scores_) continue;
      tile_product<Left::rows, false>(left + shape_.student, shape_.left, w_.teacher_keys + k * shape_.teacher,
                                      shape_.teacher, b + k, shape_.stride);
    }
  }

  void wide_differences(const Sequence<T>& tokens, int64_t head, int64_t first, int64_t n, T* out) {
    if constexpr (kMayCancel) {
      if (!packed_) wide_rows_.pack_keys(args_, tokens, head_s_, head_t_, !scores_);
      packed_ = true;
      wide_rows_.pack(args_, tokens, head, first, n);
      for (int64_t k = 0; k < tokens.sees(first + n - 1); k += kColumns)
        wide_rows_.differences(k, out + k, shape_.stride);
    }
  }

  // The rule on the rows of one tile; zeros behind what a row sees, as far as the gradients' tiles read. Returns
  // whether the differences are small beside the first of the products that made them, whose mean square over
  // directions at random is |x|^2 |y|^2 / d: then they have lost digits.
  bool finish_rows(const Sequence<T>& tokens, int64_t head, int64_t begin, int64_t first, int64_t n, int64_t width) {
    const bool square = args_.kind == AttentionKind::prob_mse;
    bool have_a = false;
    T found = 0, expected = 0;
    for (int64_t r = first; r < first + n; ++r) {
      const int64_t at = tokens.row(begin + r), keys = tokens.sees(begin + r);
      const T scale = tokens.scale(head)[at];
      const AttentionRow<T> row{w_.b + r * shape_.stride, w_.c + (r - first) * shape_.stride, keys, scale_s_ * scale};
      const Spread<T> s = scores_ ? Spread<T>{} : exact_ || wide_ ? spread<false>(row) : spread<true>(row);
      const bool narrow = square && shape_.student <= kNarrow && s.width > T(kNarrowSpread);
      T value = 0;
      if (scores_) {
        value = score_mse(row);
      } else if (s.near && !narrow) {
        const AttentionRow<T> whole = in_whole_vectors(row);
        T* room = w_.a + (r - first) * shape_.stride;  // no far row's
        value = square ? near_prob_mse(whole, room, s.largest_b) : near_prob_kl(whole, s.largest_b);
      } else {
        if (!have_a) student_scores(tokens, head, begin + first, n);
        have_a = true;
        T* a = w_.a + (r - first) * shape_.stride;
        value = square ? far_row<true>(row, a) : far_row<false>(row, a);
      }
      found += scores_ ? value : static_cast<T>(keys) * s.width * s.width / 16;  // of four standard deviations
      expected += static_cast<T>(keys) * squares(w_.left + r * shape_.left, shape_.student) * key_size_;
      tokens.values(head)[at] = value * scale;
      std::fill(row.b + keys, row.b + round_up(width, kTileRows), T(0));
    }
    return kMayCancel && !wide_ && found < T(kSmallest * kSmallest) * expected;
  }

  // The row with keys of weight 0 up to a whole vector: the loops of the rule then have no tail.
  static AttentionRow<T> in_whole_vectors(AttentionRow<T> row) {
    const int64_t keys = round_up(row.keys, kLanes<T>);
    std::fill(row.b + row.keys, row.b + keys, T(-INFINITY));
    std::fill(row.c + row.keys, row.c + keys, row.c[0]);
    return {row.b, row.c, keys, row.factor};
  }

  // The student's own scores of `n` rows from `first`, one tile.
  void student_scores(const Sequence<T>& tokens, int64_t head, int64_t first, int64_t n) {
    const Head<T> qs = tokens.of(args_.student_q, head);
    std::fill_n(w_.a_left, kTileRows * shape_.student, T(0));
    for (int64_t r = 0; r < n; ++r) {
      const T* s = qs.row(tokens.row(first + r));
      for (int64_t j = 0; j < shape_.student; ++j) w_.a_left[r * shape_.student + j] = scale_s_ * s[j];
    }
    for (int64_t k = 0; k < tokens.sees(first + n - 1); k += kColumns)
      tile_product<Left::rows, false>(w_.a_left, shape_.student, student_panel(k), shape_.student, w_.a + k,
                                      shape_.stride);
  }

  void write_dq(const Sequence<T>& tokens, int64_t head, int64_t begin, int64_t first, int64_t n) {
    const int64_t keys = tokens.sees(begin + first + n - 1);
    for (int64_t j = 0; j < shape_.columns; j += kColumns)
      tile_product<Left::rows, false>(w_.b + first * shape_.stride, shape_.stride, w_.key_panels + j * shape_.keys,
                                      keys, w_.dq + j, shape_.columns);
    for (int64_t r = 0; r < n; ++r)
      std::copy_n(w_.dq + r * shape_.columns, shape_.student,
                  tokens.dq(head) + tokens.row(begin + first + r) * shape_.student);
  }

  void add_dk(const Sequence<T>& tokens, int64_t begin, int64_t n, int64_t width) {
    if (!dk_begun_ && args_.causal) std::fill_n(w_.dk, shape_.keys * shape_.columns, T(0));
    if (dk_begun_ || args_.causal)
      multiply_dk<true>(tokens, begin, n, width);
    else
      multiply_dk<false>(tokens, begin, n, width);  // every row sees every key
    dk_begun_ = true;
  }

  template <bool kAdd>
  void multiply_dk(const Sequence<T>& tokens, int64_t begin, int64_t n, int64_t width) {
    int64_t r = 0;
    for (int64_t k = 0; k < width; k += kTileRows) {
      while (tokens.sees(begin + r) <= k) ++r;  // the rows before see none of these keys
      for (int64_t j = 0; j < shape_.columns; j += kColumns)
        tile_product<Left::columns, kAdd>(w_.b + r * shape_.stride + k, shape_.stride,
                                          w_.query_panels + j * shape_.block + r * kColumns, n - r,
                                          w_.dk + k * shape_.columns + j, shape_.columns);
    }
  }
};

}  // namespace

void attention(const AttentionArgs& args, int threads) {
  with_compute(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Shape shape = shape_of<T>(args);
    const int64_t each = Workspace<T>{}.lay_out(shape, nullptr);
    for_key_heads<T>(args, threads, each, [&](T* memory) { return Kernel<T>(args, shape, memory); });
  });
}

}  // namespace FD_ISA
}  // namespace fastdistil
