// score_mse without any map: the squared difference of two low-rank matrices (docs/losses.md, section 5).
//
// X_s Y_s^T - X_t Y_t^T = [X_s - X_t, X_t] [Y_s, Y_s - Y_t]^T =: U W^T with X = scale * Q and Y = K, so that row i's
// squared norm is U_i M U_i^T with M = W^T W, dX_s = 2 U M's first half, dY_s = 2 W (U^T X_s): time linear in S, and
// nothing cancels as the student's factors near its teacher's. Where only the maps are alike (factors in another basis)
// the two halves of U W^T cancel each other: then the head is done again in double. So it is where a row's value is far
// below that of rows in random directions: the keys' differences then have a vector in common, which this row hardly
// sees, and which would leave it no digits. A square of a difference loses twice the digits of the difference: where
// double has too few, the caller is told to take the tiles of attention.cpp. Factors of different sizes have no
// difference: U = [X_s, X_t], W = [Y_s, -Y_t], in double from the beginning.
//
// Work, for one head size: 11 S d^2 multiply-adds a head (3 for M, whose symmetry is used in halves, 4 for U M, 2 each
// for U^T Q_s and dK). The floor is 8: 2 each for half of M and of U^T U, of which U^T Q_s is a sum of columns, and 2
// each for dQ and dK. It knows only the sum of the values, where U M gives each row its own.
#include <atomic>

#include "attention_heads.h"
#include "attention_tiles.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

constexpr int64_t kBlock = 64;  // tokens: U, W and their panels stay in the L1 and L2 caches

template <class T>
struct Factors {
  int64_t size, teacher;        // head sizes
  int64_t half, width, stride;  // columns of U and W: of their first half, all; their row stride
  T *rows, *panels;             // a block of U or W: row by row, and as panels (W, or the queries)
  T *gram, *mixed;              // M and 2 U^T Q_s, as panels
  T* products;                  // kTileRows rows of U M or of W (U^T Q_s)

  explicit Factors(const AttentionArgs& args)
      : size(args.student_q.size),
        teacher(args.teacher_q.size),
        half(round_up(size, kTileColumns<T>)),
        width(half + round_up(teacher, kTileColumns<T>)),
        stride(width + Carver<T>::kLine) {
    lay_out(nullptr);
  }

  int64_t lay_out(T* memory) {
    Carver<T> carver{memory};
    carver.take(rows, kBlock * stride), carver.take(panels, kBlock * width);
    carver.take(gram, width * width), carver.take(mixed, width * half), carver.take(products, kTileRows * width);
    return carver.used;
  }
};

// In: what the inputs are read as and the outputs are written in; T: computed in.
template <class In, class T>
class LowRank {
  static constexpr int64_t kColumns = kTileColumns<T>;
  static_assert(kBlock % kTileRows == 0);
  // How many times smaller a value may be than what it is made of.
  static constexpr double kCancelled = std::is_same_v<T, double> ? 1e10 : 16;
  const AttentionArgs& args_;
  const T scale_s_, scale_t_;
  Factors<T> f_;
  double value_ = 0, halves_ = 0;       // of all rows: the squared norm of U_i W^T, and of its two halves by themselves
  T left_trace_ = 0, right_trace_ = 0;  // of M's halves, over the head size
  bool lost_ = false;                   // some row's value is far below what its length lets expect

 public:
  LowRank(const AttentionArgs& args, T* memory)
      : args_(args),
        scale_s_(static_cast<T>(args.student_scale)),
        scale_t_(static_cast<T>(args.teacher_scale)),
        f_(args) {
    f_.lay_out(memory);
  }

  // Returns whether every row has kept its digits.
  bool run(const Item& item) {
    Sequence<In> tokens(args_, item.sequence);
    const int64_t key_head = item.key_head;
    const int64_t group_s = args_.student_q.heads / args_.student_k.heads;
    const int64_t group_t = args_.teacher_q.heads / args_.teacher_k.heads;
    int64_t known = -1;  // the teacher's key head of M
    bool added = false;
    for (int64_t h = key_head * group_s; h < (key_head + 1) * group_s; ++h) {
      tokens.select_rows(h);
      if (tokens.n_rows() == 0) continue;
      if (known != h / group_t) find_gram(tokens, key_head, known = h / group_t);
      query_head(tokens, h);
      if (args_.dk && added) add_dk<true>(tokens, key_head, known);
      if (args_.dk && !added) add_dk<false>(tokens, key_head, known);
      added = true;
    }
    if (args_.dk) tokens.clear_dk(key_head, !added);
    return !lost_ && !(kCancelled * value_ < halves_);
  }

 private:
  // A row of U or W, each half with zeros up to whole tiles: `both` sets an element of the two, or, where the head
  // sizes differ, `own` one of the first and `other` one of the second.
  template <class Both, class Own, class Other>
  void set_row(int64_t i, Both&& both, Own&& own, Other&& other) {
    T *left = f_.rows + i * f_.stride, *right = left + f_.half;
    if (f_.size == f_.teacher) {
      for (int64_t j = 0; j < f_.size; ++j) both(j, left[j], right[j]);
    } else {
      for (int64_t j = 0; j < f_.size; ++j) left[j] = own(j);
      for (int64_t j = 0; j < f_.teacher; ++j) right[j] = other(j);
    }
    std::fill(left + f_.size, right, T(0)), std::fill(right + f_.teacher, left + f_.width, T(0));
  }

  int64_t load_keys(const Sequence<In>& tokens, int64_t head_s, int64_t head_t, int64_t begin) {
    const Head<In> ks = tokens.of(args_.student_k, head_s), kt = tokens.of(args_.teacher_k, head_t);
    const int64_t n = std::min(kBlock, tokens.n_keys() - begin);
    for (int64_t i = 0; i < n; ++i) {
      const In *s = ks.row(tokens.key(begin + i)), *t = kt.row(tokens.key(begin + i));
      const auto own = [s](int64_t j) -> T { return s[j]; };
      const auto others = [t](int64_t j) -> T { return -t[j]; };
      const auto both = [=](int64_t j, T& left, T& right) { left = own(j), right = left + others(j); };
      set_row(i, both, own, others);
    }
    clear_rows(n);
    return n;
  }

  // Zeros in the rest of the last tile of rows.
  void clear_rows(int64_t n) {
    for (int64_t i = n; i < round_up(n, kTileRows); ++i) std::fill_n(f_.rows + i * f_.stride, f_.width, T(0));
  }

  void find_gram(const Sequence<In>& tokens, int64_t head_s, int64_t head_t) {
    std::fill_n(f_.gram, f_.width * f_.width, T(0));
    for (int64_t begin = 0; begin < tokens.n_keys(); begin += kBlock) {
      const int64_t n = load_keys(tokens, head_s, head_t, begin);
      for (int64_t i = 0; i < n; ++i) {
        const T* row = f_.rows + i * f_.stride;
        set_panel_row(f_.panels, kBlock, i, f_.width, [row](int64_t j) { return row[j]; });
      }
      for (int64_t j = 0; j < f_.width; j += kColumns)
        for (int64_t i = 0; i < (j < f_.half ? f_.half : f_.width); i += kTileRows)
          tile_product<Left::columns, true>(f_.rows + i, f_.stride, f_.panels + j * kBlock, n,
                                            f_.gram + j * f_.width + i * kColumns, kColumns);
    }
    for (int64_t i = f_.half; i < f_.width; ++i)
      for (int64_t j = 0; j < f_.half; ++j) *gram(i, j) = *gram(j, i);
    left_trace_ = right_trace_ = 0;
    for (int64_t i = 0; i < f_.half; ++i) left_trace_ += *gram(i, i) / static_cast<T>(f_.size);
    for (int64_t i = f_.half; i < f_.width; ++i) right_trace_ += *gram(i, i) / static_cast<T>(f_.teacher);
  }

  T* gram(int64_t i, int64_t j) { return f_.gram + j / kColumns * kColumns * f_.width + i * kColumns + j % kColumns; }

  // Values and dq of a query head, and 2 U^T Q_s with the rows' scales.
  void query_head(const Sequence<In>& tokens, int64_t head) {
    const Head<In> qs = tokens.of(args_.student_q, head), qt = tokens.of(args_.teacher_q, head);
    const T scale_s_ = this->scale_s_, scale_t_ = this->scale_t_, rest = scale_s_ - scale_t_;
    std::fill_n(f_.mixed, f_.width * f_.half, T(0));
    for (int64_t begin = 0; begin < tokens.n_rows(); begin += kBlock) {
      const int64_t n = std::min(kBlock, tokens.n_rows() - begin);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = tokens.row(begin + i);
        const In *s = qs.row(at), *t = qt.row(at);
        const auto own = [=](int64_t j) -> T { return scale_s_ * s[j]; };
        const auto others = [=](int64_t j) -> T { return scale_t_ * t[j]; };
        const auto both = [=](int64_t j, T& left, T& right) {
          const T u = t[j];
          left = scale_s_ * (s[j] - u) + rest * u, right = scale_t_ * u;
        };
        set_row(i, both, own, others);
        const T factor = 2 * scale_s_ * static_cast<T>(tokens.scale(head)[at]);
        if (args_.dk) set_panel_row(f_.panels, kBlock, i, f_.size, [=](int64_t j) { return factor * s[j]; });
      }
      clear_rows(n);
      for (int64_t i = 0; i < n; i += kTileRows)
        finish_rows(tokens, head, begin, i, std::min<int64_t>(kTileRows, n - i));
      if (!args_.dk) continue;
      for (int64_t j = 0; j < f_.half; j += kColumns)
        for (int64_t i = 0; i < f_.width; i += kTileRows)
          tile_product<Left::columns, true>(f_.rows + i, f_.stride, f_.panels + j * kBlock, n,
                                            f_.mixed + j * f_.width + i * kColumns, kColumns);
    }
  }

  // One tile of rows of U M: the values, and dq from its first half.
  void finish_rows(const Sequence<In>& tokens, int64_t head, int64_t begin, int64_t first, int64_t n) {
    const T *left = f_.rows + first * f_.stride, *right = left + f_.half;
    for (int64_t j = 0; j < f_.width; j += kColumns)
      tile_product<Left::rows, false>(left, f_.stride, f_.gram + j * f_.width, f_.half, f_.products + j, f_.width);
    const int64_t rest = f_.width - f_.half;
    T of_left[kTileRows], across[kTileRows];  // the left half's square, and its product with the right one
    for (int64_t r = 0; r < n; ++r) {
      of_left[r] = dot(left + r * f_.stride, f_.products + r * f_.width, f_.half);
      across[r] = dot(right + r * f_.stride, f_.products + r * f_.width + f_.half, rest);
    }
    for (int64_t j = 0; j < f_.width; j += kColumns)
      tile_product<Left::rows, true>(right, f_.stride, f_.gram + j * f_.width + f_.half * kColumns, rest,
                                     f_.products + j, f_.width);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = tokens.row(begin + first + r);
      const T* product = f_.products + r * f_.width;
      const T scale = static_cast<T>(tokens.scale(head)[at]), factor = 2 * scale_s_ * scale;
      const T value = dot(left + r * f_.stride, product, f_.width);
      value_ += value * scale;
      halves_ += (of_left[r] + (dot(right + r * f_.stride, product + f_.half, rest) - across[r])) * scale;
      const T *u = left + r * f_.stride, *v = u + f_.half;
      lost_ = lost_ || T(kCancelled) * value < dot(u, u, f_.half) * left_trace_ + dot(v, v, rest) * right_trace_;
      tokens.values(head)[at] = static_cast<In>(value * scale);
      if (!args_.dq) continue;
      In* dq = tokens.dq(head) + at * f_.size;
      for (int64_t j = 0; j < f_.size; ++j) dq[j] = static_cast<In>(factor * product[j]);
    }
  }

  static T dot(const T* x, const T* y, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
    return sum;
  }

  template <bool kAdd>
  void add_dk(const Sequence<In>& tokens, int64_t head_s, int64_t head_t) {
    for (int64_t begin = 0; begin < tokens.n_keys(); begin += kBlock) {
      const int64_t n = load_keys(tokens, head_s, head_t, begin);
      for (int64_t i = 0; i < n; i += kTileRows) {
        for (int64_t j = 0; j < f_.half; j += kColumns)
          tile_product<Left::rows, false>(f_.rows + i * f_.stride, f_.stride, f_.mixed + j * f_.width, f_.width,
                                          f_.products + j, f_.half);
        for (int64_t r = 0; r < std::min<int64_t>(kTileRows, n - i); ++r) {
          In* out = tokens.dk(head_s) + tokens.key(begin + i + r) * f_.size;
          const T* product = f_.products + r * f_.half;
          for (int64_t j = 0; j < f_.size; ++j) out[j] = static_cast<In>(kAdd ? out[j] + product[j] : product[j]);
        }
      }
    }
  }
};

template <class T>
class Kernel {
  const AttentionArgs& args_;
  T* memory_;
  std::atomic<bool>& kept_;

 public:
  Kernel(const AttentionArgs& args, T* memory, std::atomic<bool>& kept) : args_(args), memory_(memory), kept_(kept) {}

  static int64_t memory(const AttentionArgs& args) {
    const int64_t own = Factors<T>(args).lay_out(nullptr), again = Factors<double>(args).lay_out(nullptr);
    return std::max(own, again * static_cast<int64_t>(sizeof(double) / sizeof(T)));
  }

  void run(const Item& item, const Item&) {
    if constexpr (!std::is_same_v<T, double>)
      if (args_.student_q.size == args_.teacher_q.size && LowRank<T, T>(args_, memory_).run(item)) return;
    const bool kept = LowRank<T, double>(args_, reinterpret_cast<double*>(memory_)).run(item);
    if (!kept && !std::is_same_v<T, double>) kept_ = false;
  }
};

}  // namespace

bool attention_low_rank(const AttentionArgs& args, int threads) {
  std::atomic<bool> kept{true};
  with_compute(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t each = Kernel<T>::memory(args);
    for_key_heads<T>(args, threads, each, [&](T* memory) { return Kernel<T>(args, memory, kept); });
  });
  return kept;
}

}  // namespace FD_ISA
}  // namespace fastdistil
