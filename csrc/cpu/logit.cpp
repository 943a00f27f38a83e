// Divergence of two rows of logits, value and gradient (docs/losses.md, section 1).
//
// Bytes: each row is read once from memory for the statistics. Forward KL keeps two numbers a column there, of which
// the second pass makes the gradient without an exponential; rows of which it cannot, and mse, are read again from the
// cache. A centred rule reads them again for value and centre, and keeps two numbers a column for the gradient. It is
// written once, its lines fetched ahead. So the floor is (2 reads + 1 write) x N x V x bytes an element over the copy
// bandwidth; what limits is the exponentials, about 50 FLOPs a column. Fresh gradient pages cost as much again.
//
// Compiled once an instruction set (FD_ISA); dispatch.cpp chooses at run time.
#include "../rules/logit_args.h"

#include <optional>

#include "logit_label.h"
#include "logit_statistics.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

// Of a direct rule: the block's share of the value, and factor times its gradient.
template <class Rule, bool kNearBlock, bool kGradient, class T>
void finish_part(RowTerms<T> row, const Block<T>& block, int from, int to, T factor, T* gradient, double& value) {
  const T *a = block.a, *b = block.b, *d = block.d;
  T v = 0;
#pragma omp simd reduction(+ : v)
  for (int i = from; i < to; ++i) {
    const Terms<T> c = terms_of<Rule, kNearBlock>(Scores<T>{a[i], b[i], d[i]}, row);
    v += c.value;
    if constexpr (kGradient) gradient[i] = factor * c.slope;
  }
  value += v;
}

// Not inlined: one copy for forward and backward, which should round alike.
template <class Rule, bool kGradient, class T>
__attribute__((noinline)) void pass(const Row<T>& row, Block<T>& block, Mixture<T> mixture, T factor,
                                    Gradient<T> gradient, double& value, const Label<T>* label = nullptr) {
  const bool near = Rule::softmax && near_row(row.stats);
  const RowTerms<T> terms = row_terms<Rule>(row.stats, row.tempering, mixture);
  for_blocks(row, block, [&](int64_t begin, int padded, int n) {
    const bool staged = label || padded != n || !gradient.in_place();
    T* out = !kGradient ? nullptr : staged ? block.staged : gradient.template as<T>() + begin;
    for_parts(padded, [&](int from, int to) {
      if (near && block.near)
        finish_part<Rule, true, kGradient>(terms, block, from, to, factor, out, value);
      else
        finish_part<Rule, false, kGradient>(terms, block, from, to, factor, out, value);
    });
    if (!kGradient || !staged) return;
    if (label) label->add(block.a, begin, n, out);
    gradient.store(begin, out, n);
  });
}

// Of a centred rule: the block's shares of value and centre, and what the gradient is made of.
template <class Rule, bool kNearBlock, class T>
void terms_part(RowTerms<T> row, const Block<T>& block, int from, int to, T* p, T* slope, double& value,
                double& centre) {
  const T *a = block.a, *b = block.b, *d = block.d;
  T v = 0, f = 0;
#pragma omp simd reduction(+ : v, f)
  for (int i = from; i < to; ++i) {
    const Terms<T> c = terms_of<Rule, kNearBlock>(Scores<T>{a[i], b[i], d[i]}, row);
    v += c.value;
    f += c.p * c.slope;
    p[i] = c.p;
    slope[i] = c.slope;
  }
  value += v;
  centre += f;
}

template <class Rule, class T>
__attribute__((noinline)) void terms_block(const RowTerms<T>& terms, bool near, const Block<T>& block, int n, T* p,
                                           T* slope, double& value, double& centre) {
  for_parts(n, [&](int from, int to) {
    if (near && block.near)
      terms_part<Rule, true>(terms, block, from, to, p, slope, value, centre);
    else
      terms_part<Rule, false>(terms, block, from, to, p, slope, value, centre);
  });
}

// Writes n columns of a centred rule's gradient.
template <class T>
__attribute__((noinline)) void centred_gradient(const T* p, const T* slope, T centre, T factor, int n, T* gradient) {
#pragma omp simd
  for (int i = 0; i < n; ++i) gradient[i] = factor * (p[i] * (slope[i] - centre));
}

// Of forward KL, from what the statistics kept: with delta = x + y, e^delta - 1 = E (1 + e) + e of both terms' own.
// The factor last, as in pass: a backward's own then rounds as it does of a gradient that is there.
template <class T>
__attribute__((noinline)) void kept_gradient(const T* weights, const T* growths, T whole, T growth, T share, T factor,
                                             int n, T* gradient) {
#pragma omp simd
  for (int i = 0; i < n; ++i) gradient[i] = factor * (share * weights[i] * (growths[i] * whole + growth));
}

template <class Rule, class T>
class Kernel {
  // Whose forward's first pass may keep what its gradient is made of.
  static constexpr bool kKeeps = std::is_same_v<Rule, ForwardKL> && std::is_same_v<T, float>;

  const LogitArgs& args_;
  const LabelArgs& labels_;
  const Mixture<T> mixture_;
  const Tempering<T> tempering_;
  const T value_factor_;
  const int64_t item_;  // bytes of a logit

 public:
  Kernel(const LogitArgs& args, const LabelArgs& labels)
      : args_(args),
        labels_(labels),
        mixture_(mixture_of<T>(args.beta)),
        tempering_(tempering_of<T>(args.student_temperature, args.teacher_temperature, args.difference)),
        value_factor_(static_cast<T>(args.value_factor)),
        item_(bytes_of(args.dtype)) {}

  // A row's columns, where a pass keeps something of them.
  int64_t keeps_columns() const {
    const bool terms = Rule::centred && args_.loss && args_.gradient;
    return (kKeeps || terms) && args_.phase == Phase::all ? args_.columns : 0;
  }
  T scale(int64_t r) const { return static_cast<const T*>(args_.row_scale)[r]; }
  T dloss(int64_t r) const { return args_.dloss ? static_cast<const T*>(args_.dloss)[r] : T(1); }
  // A gradient that is there already: a factor costs it one rounding more, which a float has to spare.
  bool keeps(int64_t r) const {
    if (!args_.keep_unit) return false;
    const T factor = dloss(r);
    if (factor == T(1) || scale(r) == 0) return true;
    const Gradient<T> g = gradient(r);
    if (!g.in_place()) return false;
    T* values = g.template as<T>();
    for (int64_t i = 0; i < args_.columns; ++i) values[i] *= factor;
    return true;
  }
  T* stats(int64_t r) const { return static_cast<T*>(args_.stats) + r * kStats; }
  Gradient<T> gradient(int64_t r) const {
    if (!args_.gradient) return none();
    return {static_cast<char*>(args_.gradient) + r * args_.gradient_stride * item_, args_.dtype};
  }
  Gradient<T> none() const { return {nullptr, args_.dtype}; }
  // d loss / d student logit = (d loss / d tempered logit) / T_s
  T gradient_factor(int64_t r) const {
    return static_cast<T>(scale(r) * dloss(r) * args_.value_factor / args_.student_temperature);
  }

  Row<T> row(int64_t r) const {
    Row<T> row{};
    row.student = {static_cast<const char*>(args_.student) + r * args_.student_stride * item_, args_.dtype};
    row.teacher = {static_cast<const char*>(args_.teacher) + r * args_.teacher_stride * item_, args_.dtype};
    row.columns = args_.columns;
    row.tempering = tempering_;
    row.stats.inv_sum = static_cast<T>(1.0 / args_.columns);  // what MeanSquare divides by; a softmax overwrites it
    return row;
  }

  void zero(int64_t r, bool with_gradient) const {
    if (args_.loss) static_cast<T*>(args_.loss)[r] = T(0);
    if (args_.loss)
      for (int i = 0; i < kStats; ++i) stats(r)[i] = T(0);
    if (with_gradient && args_.gradient) gradient(r).zero(args_.columns);
  }

  bool labelled(int64_t r) const { return labels_.labels && static_cast<const T*>(labels_.label_scale)[r] != T(0); }
  Label<T> label(int64_t r, const Row<T>& row, Block<T>& block) const {
    const T scale = static_cast<const T*>(labels_.label_scale)[r];
    return {row, read_once(static_cast<const int64_t*>(labels_.labels) + r), scale, block};
  }
  // A row of scale 0 that has a label.
  void label_alone(int64_t r, Block<T>& block) const {
    const Row<T> row = this->row(r);
    const Label<T> label = this->label(r, row, block);
    static_cast<T*>(args_.loss)[r] = label.value();
    for (int64_t begin = 0; args_.gradient && begin < row.columns; begin += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(row.columns - begin, kBlock));
      const T* logits = own_logits(row, begin, n, block);
      std::fill_n(block.staged, n, T(0));
      label.add(logits, begin, n, block.staged);
      gradient(r).store(begin, block.staged, n);
    }
  }

  void take(int64_t r, Row<T>& row) const {
    const T* s = stats(r);
    row.stats = {s[kMax],    s[kInvSum], s[kLogRatio],   s[kCentre],    s[kReference],
                 s[kOwnMax], s[kOwnLog], s[kTopStudent], s[kTopTeacher]};
    row.tempering.shift_to(s[kShift], s[kShiftTeacher]);
  }

  void put(int64_t r, const Row<T>& row, T loss) const {
    T* s = stats(r);
    s[kMax] = row.stats.max, s[kInvSum] = row.stats.inv_sum, s[kShift] = row.tempering.student;
    s[kLogRatio] = row.stats.log_ratio, s[kCentre] = row.stats.centre, s[kReference] = row.stats.reference;
    s[kOwnMax] = row.stats.own_max, s[kOwnLog] = row.stats.own_log;
    s[kTopStudent] = row.stats.top_student, s[kTopTeacher] = row.stats.top_teacher;
    s[kShiftTeacher] = row.tempering.teacher;
    static_cast<T*>(args_.loss)[r] = loss;
  }

  void forward(int64_t r, Block<T>& block, Kept<T>& kept) const {
    Row<T> row = this->row(r);
    std::optional<Label<T>> own;  // first: it brings the student's row into the cache
    if (labelled(r)) own = label(r, row, block);
    const Label<T>* label = own ? &*own : nullptr;
    block.whole = false;
    double value = 0;
    const Gradient<T> g = gradient(r);
    kept.gradient = g;
    if (args_.phase == Phase::value) {
      take(r, row);
    } else if constexpr (Rule::softmax) {
      const bool whole = args_.phase == Phase::all;
      if (statistics<Rule::centred>(row, block, !whole, kKeeps && whole ? &kept : nullptr, value)) {
        if (g) from_weights(r, row, block, kept, label);
        row.stats.centre = T(1);  // so that the backward takes the same way
        return put(r, row, row_loss(r, value, label));
      }
    }
    if (args_.phase == Phase::statistics) return put(r, row, T(0));
    value = 0;
    if constexpr (Rule::centred) {
      // The centre of a part is not the row's yet.
      const bool wanted = g && args_.phase != Phase::value;
      row.stats.centre = centre(row, block, value, wanted ? &kept : nullptr);
      if (wanted) from_terms(r, row, block, kept, label);
    } else if (g) {
      pass<Rule, true>(row, block, mixture_, gradient_factor(r), g, value, label);
    } else {
      pass<Rule, false>(row, block, mixture_, T(0), none(), value);
    }
    put(r, row, row_loss(r, value, label));
  }

  void backward(int64_t r, Block<T>& block, Kept<T>& kept) const {
    Row<T> row = this->row(r);
    block.whole = false;
    double ignored = 0;
    if (kKeeps && stats(r)[kCentre] == T(1)) {
      kept.gradient = gradient(r);
      if (statistics<false>(row, block, false, &kept, ignored)) return from_weights(r, row, block, kept, nullptr);
      row = this->row(r);
    }
    take(r, row);
    if constexpr (Rule::centred) {
      const bool near = near_row(row.stats);
      const RowTerms<T> terms = row_terms<Rule>(row.stats, row.tempering, mixture_);
      for_blocks(row, block, [&](int64_t begin, int padded, int n) {
        const Gradient<T> g = gradient(r);
        T* out = g.in_place() ? g.template as<T>() + begin : block.staged;
        terms_block<Rule>(terms, near, block, padded, block.p, block.slope, ignored, ignored);
        centred_gradient(block.p, block.slope, row.stats.centre, gradient_factor(r), n, out);
        if (!g.in_place()) g.store(begin, out, n);
      });
    } else {
      pass<Rule, true>(row, block, mixture_, gradient_factor(r), gradient(r), ignored);
    }
  }

 private:
  T row_loss(int64_t r, double value, const Label<T>* label) const {
    return static_cast<T>(value * value_factor_ * scale(r)) + (label ? label->value() : T(0));
  }

  void from_weights(int64_t r, const Row<T>& row, Block<T>& block, Kept<T>& kept, const Label<T>* label) const {
    const T factor = gradient_factor(r);
    for_written(r, row, block, label, [&](int64_t begin, int n, T* out) {
      const Unit<T> unit = kept.unit(begin);
      const double y = static_cast<double>(unit.difference) - row.stats.reference - row.stats.log_ratio;
      const double down = std::exp((static_cast<double>(unit.teacher) - row.stats.max) * row.tempering.inv_teacher);
      kept_gradient(kept.first(begin), kept.second(begin), static_cast<T>(std::exp(y)), static_cast<T>(std::expm1(y)),
                    static_cast<T>(down * row.stats.inv_sum), factor, n, out);
    });
  }

  // A centred rule's centre and value; `kept`, unless null, gets what the gradient is made of.
  T centre(const Row<T>& row, Block<T>& block, double& value, Kept<T>* kept) const {
    const bool near = near_row(row.stats);
    const RowTerms<T> terms = row_terms<Rule>(row.stats, row.tempering, mixture_);
    double sum = 0;
    for_blocks(row, block, [&](int64_t begin, int padded, int n) {
      if (kept) kept->gradient.prefetch(begin, n);
      T* p = kept ? kept->first(begin) : block.p;
      T* slope = kept ? kept->second(begin) : block.slope;
      terms_block<Rule>(terms, near, block, padded, p, slope, value, sum);
    });
    return static_cast<T>(sum);
  }

  void from_terms(int64_t r, const Row<T>& row, Block<T>& block, const Kept<T>& kept, const Label<T>* label) const {
    const T centre = row.stats.centre, factor = gradient_factor(r);
    for_written(r, row, block, label, [&](int64_t begin, int n, T* out) {
      centred_gradient(kept.first(begin), kept.second(begin), centre, factor, n, out);
    });
  }

  // fill(begin, n, out) writes the gradient of a block's columns, what is left to do with them is done here.
  template <class Fill>
  void for_written(int64_t r, const Row<T>& row, Block<T>& block, const Label<T>* label, Fill&& fill) const {
    const Gradient<T> g = gradient(r);
    const bool staged = label || !g.in_place();
    for (int64_t begin = 0; begin < row.columns; begin += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(row.columns - begin, kBlock));
      fill(begin, n, staged ? block.staged : g.template as<T>() + begin);
      if (!staged) continue;
      if (label) label->add(own_logits(row, begin, n, block), begin, n, block.staged);
      g.store(begin, block.staged, n);
    }
  }
};

template <class Rule, class T>
void run(const LogitArgs& args, const LabelArgs& labels, int threads) {
  const Kernel<Rule, T> kernel(args, labels);
  // A share of rows worth about 16 blocks: narrow rows would cost more in scheduling than in work.
  const int64_t share = 1 + 16 * kBlock / (args.columns + 1);
  if (args.rows <= share) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    Block<T> block;
    Kept<T> kept(kernel.keeps_columns());
#pragma omp for schedule(dynamic, share)
    for (int64_t r = 0; r < args.rows; ++r) {
      if (kernel.keeps(r)) continue;
      if (kernel.scale(r) == 0) {
        kernel.zero(r, !kernel.labelled(r));
        if (kernel.labelled(r)) kernel.label_alone(r, block);
      } else if (args.loss)
        kernel.forward(r, block, kept);
      else
        kernel.backward(r, block, kept);
    }
  }
}

}  // namespace

void logit(const LogitArgs& args, const LabelArgs& labels, int threads) {
  with_rule(static_cast<Divergence>(args.divergence), [&](auto rule) {
    using Rule = decltype(rule);
    args.dtype == DType::f64 ? run<Rule, double>(args, labels, threads) : run<Rule, float>(args, labels, threads);
  });
}

}  // namespace FD_ISA
}  // namespace fastdistil
