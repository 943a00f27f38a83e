// Losses between two attention maps, value and gradient, a block of query rows at a time (docs/losses.md, section 4).
//
// Work: S^2 d multiply-adds a head for the teacher's scores, 2 S^2 d for the exact difference (S^2 d where the head
// sizes differ), 2 S^2 d for the two gradients; the rule itself is about 45 operations an entry. So the floor is
// 10 B H S^2 d operations over the multiply-add rate. A block of scores stays in a core's L2 cache, the maps are never
// whole.
//
// Padding costs nothing: hidden keys and query rows of scale 0 are left out where the operands are packed, so that the
// products and the rule see dense rows.
//
// Compiled once an instruction set (FD_ISA); dispatch.cpp chooses at run time.
#include "attention_heads.h"
#include "attention_rows.h"
#include "tiles.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

// Scores of a block, of which there are two buffers: 256 KiB of float each, both in an L2 cache of 1 MiB.
constexpr int64_t kBlockElements = 64 * 1024;
constexpr int64_t kLargestBlock = 256;  // rows

struct Shape {
  int64_t student, teacher;  // head sizes
  bool exact;                // the difference is formed as [X_s - X_t, X_t] [Y_s, Y_s - Y_t]^T
  int64_t inner, left;       // depth of the student's product; columns of the packed query rows
  int64_t keys, stride;      // most keys; row stride of a block
  int64_t block, columns;    // rows of a block; columns of the gradients
};

template <class T>
Shape shape_of(const AttentionArgs& args) {
  Shape s{};
  s.student = args.student_q.size, s.teacher = args.teacher_q.size, s.exact = s.student == s.teacher;
  s.inner = s.exact ? 2 * s.student : s.student, s.left = s.student + s.teacher;
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
    carver.take(teacher_keys, s.keys * s.teacher), carver.take(student_keys, s.keys * s.inner);
    carver.take(key_panels, s.keys * s.columns), carver.take(dk, s.keys * s.columns);
    carver.take(left, s.block * s.left), carver.take(query_panels, s.block * s.columns);
    carver.take(b, s.block * s.stride), carver.take(c, s.block * s.stride), carver.take(a, kTileRows * s.stride);
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
  Workspace<T> w_{};

 public:
  Kernel(const AttentionArgs& args, const Shape& shape, T* memory)
      : args_(args),
        shape_(shape),
        scale_s_(static_cast<T>(args.student_scale)),
        scale_t_(static_cast<T>(args.teacher_scale)) {
    w_.lay_out(shape, memory);
  }

  void run(int64_t sequence, int64_t key_head) {
    Sequence<E> tokens(args_, sequence);
    const int64_t group_s = args_.student_q.heads / args_.student_k.heads;
    const int64_t group_t = args_.teacher_q.heads / args_.teacher_k.heads;
    if (args_.dk) std::fill_n(w_.dk, shape_.keys * shape_.columns, T(0));
    int64_t packed = -1;  // the teacher's key head
    for (int64_t h = key_head * group_s; h < (key_head + 1) * group_s; ++h) {
      tokens.select_rows(h);
      if (tokens.n_rows() == 0) continue;
      if (packed != h / group_t) pack_keys(tokens, key_head, packed = h / group_t);
      for (int64_t begin = 0; begin < tokens.n_rows(); begin += shape_.block)
        block(tokens, h, begin, std::min(shape_.block, tokens.n_rows() - begin));
    }
    if (!args_.dk) return;
    T* dk = tokens.clear_dk(key_head);
    for (int64_t k = 0; k < tokens.n_keys(); ++k)
      std::copy_n(w_.dk + k * shape_.columns, shape_.student, dk + tokens.key(k) * shape_.student);
  }

 private:
  // Keys as panels: transposed for the scores, as they are for dq.
  void pack_keys(const Sequence<E>& tokens, int64_t head_s, int64_t head_t) {
    const Head<E> ks = tokens.of(args_.student_k, head_s), kt = tokens.of(args_.teacher_k, head_t);
    for (int64_t k = 0; k < round_up(tokens.n_keys(), kColumns); ++k) {
      T* teacher = w_.teacher_keys + k / kColumns * kColumns * shape_.teacher + k % kColumns;
      T* student = w_.student_keys + k / kColumns * kColumns * shape_.inner + k % kColumns;
      if (k >= tokens.n_keys()) {
        for (int64_t j = 0; j < shape_.teacher; ++j) teacher[j * kColumns] = T(0);
        for (int64_t j = 0; j < shape_.inner; ++j) student[j * kColumns] = T(0);
        continue;
      }
      const E *s = ks.row(tokens.key(k)), *t = kt.row(tokens.key(k));
      for (int64_t j = 0; j < shape_.teacher; ++j) teacher[j * kColumns] = to_compute(t[j]);
      for (int64_t j = 0; j < shape_.student; ++j) student[j * kColumns] = to_compute(s[j]);
      if (shape_.exact)
        for (int64_t j = 0; j < shape_.student; ++j)
          student[(shape_.student + j) * kColumns] = to_compute(s[j]) - to_compute(t[j]);
      if (args_.dq)
        set_panel_row(w_.key_panels, shape_.keys, k, shape_.student, [s](int64_t j) { return to_compute(s[j]); });
    }
  }

  // Query rows in groups of kTileRows, transposed within a group: the student's left factor, then the teacher's.
  void pack_rows(const Sequence<E>& tokens, int64_t head, int64_t begin, int64_t n) {
    const Head<E> qs = tokens.of(args_.student_q, head), qt = tokens.of(args_.teacher_q, head);
    const T rest = scale_s_ - scale_t_;
    for (int64_t r = 0; r < round_up(n, kTileRows); ++r) {
      T* left = w_.left + r / kTileRows * kTileRows * shape_.left + r % kTileRows;
      if (r >= n) {
        for (int64_t j = 0; j < shape_.left; ++j) left[j * kTileRows] = T(0);
        continue;
      }
      const E *s = qs.row(tokens.row(begin + r)), *t = qt.row(tokens.row(begin + r));
      for (int64_t j = 0; j < shape_.student; ++j) {
        const T q = to_compute(s[j]), u = shape_.exact ? to_compute(t[j]) : T(0);
        left[j * kTileRows] = scale_s_ * (q - u) + rest * u;
      }
      for (int64_t j = 0; j < shape_.teacher; ++j) left[(shape_.student + j) * kTileRows] = scale_t_ * to_compute(t[j]);
      if (args_.dk)
        set_panel_row(w_.query_panels, shape_.block, r, shape_.student, [s](int64_t j) { return to_compute(s[j]); });
    }
  }

  void block(const Sequence<E>& tokens, int64_t head, int64_t begin, int64_t n) {
    pack_rows(tokens, head, begin, n);
    const int64_t width = tokens.sees(begin + n - 1);  // no row sees more than the last one
    for (int64_t k = 0; k < width; k += kColumns)
      for (int64_t r = 0; r < n; r += kTileRows) {
        if (k >= tokens.sees(begin + std::min(r + kTileRows, n) - 1)) continue;
        const T* left = w_.left + r * shape_.left;
        tile_product<Left::columns, false>(left + shape_.student * kTileRows, kTileRows,
                                           w_.teacher_keys + k * shape_.teacher, shape_.teacher,
                                           w_.b + r * shape_.stride + k, shape_.stride);
        tile_product<Left::columns, false>(left, kTileRows, w_.student_keys + k * shape_.inner, shape_.inner,
                                           w_.c + r * shape_.stride + k, shape_.stride);
      }
    for (int64_t r = 0; r < n; r += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, n - r);
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
      const AttentionRow<T> row{w_.b + r * shape_.stride, w_.c + r * shape_.stride, keys, scale_s_ * scale};
      if (!shape_.exact) subtract(row);
      T value = 0;
      if (args_.kind == AttentionKind::score_mse) {
        value = score_mse(row);
      } else if (const Spread<T> s = spread(row); s.near) {
        value = square ? near_prob_mse(row, s.largest_b) : near_prob_kl(row, s.largest_b);
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

  // The student's own scores of `n` rows from `first`, one tile.
  void student_scores(const Sequence<E>& tokens, int64_t head, int64_t first, int64_t n) {
    const Head<E> qs = tokens.of(args_.student_q, head);
    std::fill_n(w_.a_left, kTileRows * shape_.student, T(0));
    for (int64_t r = 0; r < n; ++r) {
      const E* s = qs.row(tokens.row(first + r));
      for (int64_t j = 0; j < shape_.student; ++j) w_.a_left[j * kTileRows + r] = scale_s_ * to_compute(s[j]);
    }
    for (int64_t k = 0; k < tokens.sees(first + n - 1); k += kColumns)
      tile_product<Left::columns, false>(w_.a_left, kTileRows, w_.student_keys + k * shape_.inner, shape_.student,
                                         w_.a + k, shape_.stride);
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
    int64_t r = 0;
    for (int64_t k = 0; k < width; k += kTileRows) {
      while (tokens.sees(begin + r) <= k) ++r;  // the rows before see none of these keys
      for (int64_t j = 0; j < shape_.columns; j += kColumns)
        tile_product<Left::columns, true>(w_.b + r * shape_.stride + k, shape_.stride,
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
