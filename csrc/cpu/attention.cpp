// Losses between two attention maps, value and gradient, a block of query rows at a time (docs/losses.md, section 4).
//
// Work: S^2 d multiply-adds a head for the teacher's scores, 2 S^2 d for the exact difference (S^2 d where the keys lie
// far apart or the head sizes differ; score_mse needs the difference alone), 2 S^2 d for the two gradients; the rule
// itself is about 45 operations an entry. So the floor is 8 to 10 B H S^2 d operations over the multiply-add rate. A
// block of scores stays in a core's L2 cache, the maps are never whole.
//
// Padding costs nothing: hidden keys and query rows of scale 0 are left out where the operands are packed, so that the
// products and the rule see dense rows.
//
// Compiled once an instruction set (FD_ISA); dispatch.cpp chooses at run time.
#include "attention_heads.h"
#include "attention_rows.h"
#include "attention_tiles.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

// Scores of a block, which become their gradients: 256 KiB of float, in an L2 cache of 1 MiB.
constexpr int64_t kBlockElements = 64 * 1024;
constexpr int64_t kLargestBlock = 256;  // rows
constexpr double kFar = 0.5;            // |K_s - K_t| / |K_t|: from here on c keeps its digits without the exact form

struct Shape {
  int64_t student, teacher;  // head sizes
  int64_t left;              // row stride of the packed query rows: student's, then teacher's
  int64_t keys, stride;      // most keys; row stride of a block
  int64_t block, columns;    // rows of a block; columns of the gradients
};

template <class T>
Shape shape_of(const AttentionArgs& args) {
  Shape s{};
  s.student = args.student_q.size, s.teacher = args.teacher_q.size, s.left = s.student + s.teacher + Carver<T>::kLine;
  s.keys = round_up(longest(args), kTileColumns<T>);
  s.stride = s.keys + Carver<T>::kLine;  // a power of two would map a column to one set of the L1 cache
  const int64_t fitting = kBlockElements / std::max<int64_t>(s.keys, 1) / kTileRows * kTileRows;
  const int64_t most = std::min(kLargestBlock, std::max<int64_t>(round_up(longest(args), kTileRows), kTileRows));
  s.block = std::min(std::max<int64_t>(fitting, kTileRows), most);
  s.columns = round_up(s.student, kTileColumns<T>);
  return s;
}

template <class T>
struct Workspace {
  T *teacher_keys, *student_keys, *key_panels, *left, *query_panels, *b, *c, *a, *a_left, *dk, *dq;

  int64_t lay_out(const Shape& s, T* memory) {
    Carver<T> carver{memory};
    carver.take(teacher_keys, s.keys * s.teacher);
    carver.take(student_keys, s.keys * (s.student + std::max(s.student, s.teacher)));
    carver.take(key_panels, s.keys * s.columns), carver.take(dk, s.keys * s.columns);
    carver.take(left, s.block * s.left), carver.take(query_panels, s.block * s.columns);
    carver.take(b, s.block * s.stride), carver.take(c, kTileRows * s.stride), carver.take(a, kTileRows * s.stride);
    carver.take(a_left, kTileRows * s.student), carver.take(dq, kTileRows * s.columns);
    return carver.used;
  }
};

template <class E>
class Kernel {
  using T = Compute<E>;
  static constexpr int64_t kColumns = kTileColumns<T>;
  const AttentionArgs& args_;
  const Shape shape_;
  const T scale_s_, scale_t_;
  const bool scores_;  // score_mse: b alone, the difference [X_s, -X_t] [Y_s, Y_t]^T or its exact form
  Workspace<T> w_{};
  bool exact_ = false;  // of the keys that are packed: the difference is [X_s - X_t, X_t] [Y_s, Y_s - Y_t]^T
  int64_t inner_ = 0;   // depth of the student's product
  bool dk_begun_ = false;

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
    Sequence<E> tokens(args_, item.sequence);
    Ahead<E> ahead(args_, next);
    const int64_t key_head = item.key_head;
    const int64_t group_s = args_.student_q.heads / args_.student_k.heads;
    const int64_t group_t = args_.teacher_q.heads / args_.teacher_k.heads;
    int64_t packed = -1;  // the teacher's key head
    dk_begun_ = false;
    for (int64_t h = key_head * group_s; h < (key_head + 1) * group_s; ++h) {
      tokens.select_rows(h);
      if (tokens.n_rows() == 0) continue;
      if (packed != h / group_t) pack_keys(tokens, key_head, packed = h / group_t);
      for (int64_t begin = 0; begin < tokens.n_rows(); begin += shape_.block)
        block(tokens, ahead, h, begin, std::min(shape_.block, tokens.n_rows() - begin));
    }
    if (!args_.dk) return;
    tokens.clear_dk(key_head, !dk_begun_);
    for (int64_t k = 0; dk_begun_ && k < tokens.n_keys(); ++k)
      std::copy_n(w_.dk + k * shape_.columns, shape_.student, tokens.dk(key_head) + tokens.key(k) * shape_.student);
  }

 private:
  // Whether the difference is worth its own product: where the keys lie far apart, subtracting the student's and the
  // teacher's scores loses nothing, and the exact form would cost a quarter more.
  bool near(const Sequence<E>& tokens, const Head<E>& ks, const Head<E>& kt) const {
    T distance = 0, size = 0;
    for (int64_t k = 0; k < tokens.n_keys(); ++k) {
      const E *s = ks.row(tokens.key(k)), *t = kt.row(tokens.key(k));
#pragma omp simd reduction(+ : distance, size)
      for (int64_t j = 0; j < shape_.student; ++j) {
        const T x = to_compute(s[j]), y = to_compute(t[j]);
        distance += (x - y) * (x - y), size += y * y;
      }
    }
    return !(distance > T(kFar * kFar) * size);
  }

  // Keys as panels: transposed for the scores, as they are for dq.
  void pack_keys(const Sequence<E>& tokens, int64_t head_s, int64_t head_t) {
    const Head<E> ks = tokens.of(args_.student_k, head_s), kt = tokens.of(args_.teacher_k, head_t);
    exact_ = shape_.student == shape_.teacher && (scores_ || near(tokens, ks, kt));
    inner_ = exact_ || scores_ ? shape_.student + shape_.teacher : shape_.student;
    for (int64_t k = 0; k < tokens.n_keys(); k += kColumns) {
      T *student = w_.student_keys + k * inner_, *behind = student + shape_.student * kColumns;
      T* teacher = scores_ ? behind : w_.teacher_keys + k * shape_.teacher;
      transpose_keys(tokens, kt, k, shape_.teacher, teacher);
      transpose_keys(tokens, ks, k, shape_.student, student);
      for (int64_t j = 0; exact_ && j < shape_.student * kColumns; ++j) behind[j] = student[j] - teacher[j];
    }
    for (int64_t k = 0; args_.dq && k < tokens.n_keys(); ++k) {
      const E* s = ks.row(tokens.key(k));
      set_panel_row(w_.key_panels, shape_.keys, k, shape_.student, [s](int64_t j) { return to_compute(s[j]); });
    }
  }

  // One panel: keys `first` to `first + kColumns`, zeros behind the last one.
  void transpose_keys(const Sequence<E>& tokens, const Head<E>& head, int64_t first, int64_t size, T* panel) {
    constexpr int n = kLanes<T>;
    alignas(64) T square[n][n], turned[n][n];
    for (int64_t k = 0; k < kColumns; k += n)
      for (int64_t j = 0; j < size; j += n) {
        const int64_t width = std::min<int64_t>(n, size - j);
        for (int i = 0; i < n; ++i) {
          std::fill_n(square[i], n, T(0));
          if (first + k + i >= tokens.n_keys()) continue;
          const E* row = head.row(tokens.key(first + k + i)) + j;
          if (width == n)
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

  // Query rows: the student's left factor, then the teacher's; and as panels for dk.
  void pack_rows(const Sequence<E>& tokens, int64_t head, int64_t begin, int64_t n) {
    const Head<E> qs = tokens.of(args_.student_q, head), qt = tokens.of(args_.teacher_q, head);
    const T own = scale_s_, rest = exact_ ? -scale_t_ : T(0);
    for (int64_t r = 0; r < round_up(n, kTileRows); ++r) {
      T *student = w_.left + r * shape_.left, *teacher = student + shape_.student;
      if (r >= n) {
        std::fill_n(student, shape_.left, T(0));
        continue;
      }
      const E *s = qs.row(tokens.row(begin + r)), *t = qt.row(tokens.row(begin + r));
      if (exact_ && own == -rest)
        for (int64_t j = 0; j < shape_.student; ++j) student[j] = own * (to_compute(s[j]) - to_compute(t[j]));
      else if (exact_)
        for (int64_t j = 0; j < shape_.student; ++j)
          student[j] = own * (to_compute(s[j]) - to_compute(t[j])) + (own + rest) * to_compute(t[j]);
      else
        for (int64_t j = 0; j < shape_.student; ++j) student[j] = own * to_compute(s[j]);
      const T others = scores_ && !exact_ ? -scale_t_ : scale_t_;
      for (int64_t j = 0; j < shape_.teacher; ++j) teacher[j] = others * to_compute(t[j]);
      if (args_.dk)
        set_panel_row(w_.query_panels, shape_.block, r, shape_.student, [s](int64_t j) { return to_compute(s[j]); });
    }
  }

  void block(const Sequence<E>& tokens, Ahead<E>& ahead, int64_t head, int64_t begin, int64_t n) {
    pack_rows(tokens, head, begin, n);
    const int64_t width = tokens.sees(begin + n - 1);  // no row sees more than the last one
    for (int64_t r = 0; r < n; r += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, n - r), sees = tokens.sees(begin + r + rows - 1);
      const T* left = w_.left + r * shape_.left;
      T* b = w_.b + r * shape_.stride;
      for (int64_t k = 0; k < sees; k += kColumns) {
        ahead.fetch(2);
        tile_product<Left::rows, false>(left, shape_.left, w_.student_keys + k * inner_, inner_,
                                        (scores_ ? b : w_.c) + k, shape_.stride);
        if (scores_) continue;
        tile_product<Left::rows, false>(left + shape_.student, shape_.left, w_.teacher_keys + k * shape_.teacher,
                                        shape_.teacher, b + k, shape_.stride);
      }
      finish_rows(tokens, head, begin, r, rows, width);
      if (args_.dq) write_dq(tokens, head, begin, r, rows);
    }
    if (args_.dk) add_dk(tokens, begin, n, width);
  }

  // The rule on the rows of one tile; zeros behind what a row sees, as far as the gradients' tiles read.
  void finish_rows(const Sequence<E>& tokens, int64_t head, int64_t begin, int64_t first, int64_t n, int64_t width) {
    const bool square = args_.kind == AttentionKind::prob_mse;
    bool have_a = false;
    for (int64_t r = first; r < first + n; ++r) {
      const int64_t at = tokens.row(begin + r), keys = tokens.sees(begin + r);
      const T scale = tokens.scale(head)[at];
      const AttentionRow<T> row{w_.b + r * shape_.stride, w_.c + (r - first) * shape_.stride, keys, scale_s_ * scale};
      const Spread<T> s = scores_ ? Spread<T>{} : exact_ ? spread<false>(row) : spread<true>(row);
      T value = 0;
      if (scores_) {
        value = score_mse(row);
      } else if (s.near) {
        const AttentionRow<T> whole = in_whole_vectors(row);
        value = square ? near_prob_mse(whole, s.largest_b) : near_prob_kl(whole, s.largest_b);
      } else {
        if (!have_a) student_scores(tokens, head, begin + first, n);
        have_a = true;
        const T* a = w_.a + (r - first) * shape_.stride;
        value = square ? far_row<true>(row, a) : far_row<false>(row, a);
      }
      tokens.values(head)[at] = value * scale;
      std::fill(row.b + keys, row.b + round_up(width, kTileRows), T(0));
    }
  }

  // The row with keys of weight 0 up to a whole vector: the loops of the rule then have no tail.
  static AttentionRow<T> in_whole_vectors(AttentionRow<T> row) {
    const int64_t keys = round_up(row.keys, kLanes<T>);
    std::fill(row.b + row.keys, row.b + keys, T(-INFINITY));
    std::fill(row.c + row.keys, row.c + keys, row.c[0]);
    return {row.b, row.c, keys, row.factor};
  }

  // The student's own scores of `n` rows from `first`, one tile.
  void student_scores(const Sequence<E>& tokens, int64_t head, int64_t first, int64_t n) {
    const Head<E> qs = tokens.of(args_.student_q, head);
    std::fill_n(w_.a_left, kTileRows * shape_.student, T(0));
    for (int64_t r = 0; r < n; ++r) {
      const E* s = qs.row(tokens.row(first + r));
      for (int64_t j = 0; j < shape_.student; ++j) w_.a_left[r * shape_.student + j] = scale_s_ * to_compute(s[j]);
    }
    for (int64_t k = 0; k < tokens.sees(first + n - 1); k += kColumns)
      tile_product<Left::rows, false>(w_.a_left, shape_.student, w_.student_keys + k * inner_, shape_.student, w_.a + k,
                                      shape_.stride);
  }

  void write_dq(const Sequence<E>& tokens, int64_t head, int64_t begin, int64_t first, int64_t n) {
    const int64_t keys = tokens.sees(begin + first + n - 1);
    for (int64_t j = 0; j < shape_.columns; j += kColumns)
      tile_product<Left::rows, false>(w_.b + first * shape_.stride, shape_.stride, w_.key_panels + j * shape_.keys,
                                      keys, w_.dq + j, shape_.columns);
    for (int64_t r = 0; r < n; ++r)
      std::copy_n(w_.dq + r * shape_.columns, shape_.student,
                  tokens.dq(head) + tokens.row(begin + first + r) * shape_.student);
  }

  void add_dk(const Sequence<E>& tokens, int64_t begin, int64_t n, int64_t width) {
    if (!dk_begun_ && args_.causal) std::fill_n(w_.dk, shape_.keys * shape_.columns, T(0));
    if (dk_begun_ || args_.causal)
      multiply_dk<true>(tokens, begin, n, width);
    else
      multiply_dk<false>(tokens, begin, n, width);  // every row sees every key
    dk_begun_ = true;
  }

  template <bool kAdd>
  void multiply_dk(const Sequence<E>& tokens, int64_t begin, int64_t n, int64_t width) {
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
  with_element(args.dtype, [&](auto element) {
    using E = decltype(element);
    using T = Compute<E>;
    const Shape shape = shape_of<T>(args);
    const int64_t each = Workspace<T>{}.lay_out(shape, nullptr);
    for_key_heads<T>(args, threads, each, [&](T* memory) { return Kernel<E>(args, shape, memory); });
  });
}

}  // namespace FD_ISA
}  // namespace fastdistil
