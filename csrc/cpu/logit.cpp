// Divergence of two rows of logits, value and gradient (docs/losses.md, section 1).
//
// Bytes: each row is read once from memory for the statistics and again, from the L2 cache, for value and gradient
// (a centred rule and labels read it a third time); the gradient is written once. FLOPs: about 80 a column. So the
// floor is (2 reads + 1 write) x N x V x bytes an element over the copy bandwidth; fresh gradient pages cost as much
// again.
//
// Compiled once an instruction set (FD_ISA); dispatch.cpp chooses at run time.
#include "../rules/logit_args.h"

#include <optional>

#include "logit_label.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

// The student's own maximum and ln of sum(exp(a - maximum)): where a column lies too far from the teacher's.
template <class T>
void own_softmax(Row<T>& row, Block<T>& block) {
  LogSum<T> own;
  for_blocks(row, block, [&](int64_t, int n, int) { own.add(block.a, n, row.tempering.inv_student); });
  row.stats.own_max = own.max, row.stats.own_log = static_cast<T>(std::log(own.sum));
}

template <bool kNearBlock, class T>
void add_block(const Block<T>& block, int n, const Tempering<T>& tempering, Masses<T, double>& masses) {
  const Unit<T> unit = masses.unit();
  const T inv_student = tempering.inv_student, inv_teacher = tempering.inv_teacher;
  const T *a = block.a, *b = block.b, *d = block.d;
  T sum = 0, difference = 0;
#pragma omp simd reduction(+ : sum, difference)
  for (int i = 0; i < n; ++i) {
    const Mass<T> part = mass<kNearBlock>(Scores<T>{a[i], b[i], d[i]}, unit, inv_student, inv_teacher);
    sum += part.sum;
    difference += part.difference;
  }
  masses.sum += sum;
  masses.difference += difference;
}

// The masses of the whole row, and whether every column lies near its teacher's; kTop: the student's largest logit too.
template <bool kTop, class T>
bool add_row(Row<T>& row, Block<T>& block, Masses<T, double>& masses) {
  bool near = true;
  T top = -INFINITY;
  if (kTop) row.stats.top_student = row.stats.top_teacher = -INFINITY;
  for_blocks(row, block, [&](int64_t begin, int n, int) {
    if (kTop) {
      const T own = block_max(block.a, n);
      if (own > top) {
        const int at = place_of(block.a, n, own);
        row.stats.top_student = row.tempering.given ? row.student[begin + at] : own;
        row.stats.top_teacher = block.b[at], top = own;
      }
    }
    const T largest = block_max(block.b, n);
    if (largest > masses.max)
      masses.raise(block.at(place_of(block.b, n, largest)), row.tempering);
    else if (masses.max == T(-INFINITY))
      masses.raise(block.at(place_of(block.a, n, block_max(block.a, n))), row.tempering);
    const bool near_block = block.near && math::magnitude(masses.reference) <= T(kNear);
    near_block ? add_block<true>(block, n, row.tempering, masses) : add_block<false>(block, n, row.tempering, masses);
    near = near && near_block;
  });
  return near;
}

// Of a row of which some columns are not on both sides: shifts to that of some columns which most others agree with.
template <class T, class At>
void guess_among_many(Tempering<T>& row, int64_t columns, At&& column_at) {
  constexpr int64_t kMost = 16;
  const int n = static_cast<int>(std::min(columns, kMost));
  T d[kMost];
  for (int i = 0; i < n; ++i) {
    const Scores<T> c = column_at(columns * i / n);
    d[i] = static_cast<T>(row.difference(c.a, c.b));
  }
  int best = -1, most = 1;
  for (int i = 0; i < n; ++i) {
    if (!usable(d[i])) continue;
    int alike = 0;
    for (int j = 0; j < n; ++j) alike += math::magnitude(d[j] - d[i]) <= math::magnitude(d[i]) / T(8);
    if (alike > most) best = i, most = alike;
  }
  if (best < 0) return;
  const Scores<T> c = column_at(columns * best / n);
  row.shift_to(c.a, c.b);
}

// Shifts to the teacher's largest column that both sides have; false where there is none.
template <class T>
bool shift_to_common(Row<T>& row) {
  T student = 0, largest = -INFINITY;
  for (int64_t i = 0; i < row.columns; ++i) {
    const T s = row.student[i], t = row.tempering.given ? T(0) : row.teacher[i];
    if (t > largest && usable(static_cast<T>(row.tempering.difference(s, t)))) student = s, largest = t;
  }
  if (largest == T(-INFINITY)) return false;
  row.tempering.shift_to(student, largest);
  return true;
}

// First pass: the teacher's maximum and sum, and D = log1p(X/S). A `part` of a row may have no teacher mass.
template <bool kCentred, class T>
void statistics(Row<T>& row, Block<T>& block, bool part) {
  const auto column_at = [&row](int64_t i) {
    return Scores<T>{row.student[i], row.tempering.given ? T(0) : row.teacher[i], T(0)};
  };
  if (!guess_shift(row.tempering, column_at(row.columns / 4), column_at(row.columns / 2),
                   column_at(row.columns / 4 * 3)))
    guess_among_many(row.tempering, row.columns, column_at);
  Masses<T, double> masses;
  bool near = add_row<kCentred>(row, block, masses);
  const bool again = misplaced(masses);
  if (again) row.tempering.shift_to(masses.own, masses.max);
  if (again || (masses.lost && row.tempering.shift == 0 && shift_to_common(row))) {
    masses = {};
    block.whole = false;
    near = add_row<kCentred>(row, block, masses);
  }
  const T max = masses.max;
  row.stats.max = max > T(-INFINITY) || part ? max : T(NAN);  // a teacher of -inf alone is an error: keep it visible
  row.stats.inv_sum = static_cast<T>(1.0 / masses.sum);
  row.stats.reference = masses.reference;
  if (exact_log_ratio(masses.difference / masses.sum, row.stats.log_ratio) && near)
    own_from_teacher(row.stats, masses.own, masses.sum);
  else
    own_softmax(row, block);
}

template <class Rule, bool kNearBlock, bool kGradient, class T>
void finish_block(RowTerms<T> row, const Block<T>& block, int n, T factor, T* gradient, double& value, double& centre) {
  const T *a = block.a, *b = block.b, *d = block.d;
  T v = 0, f = 0;
#pragma omp simd reduction(+ : v, f)
  for (int i = 0; i < n; ++i) {
    const Result<T> r = result<Rule, kNearBlock>(Scores<T>{a[i], b[i], d[i]}, row);
    v += r.value;
    if constexpr (Rule::centred) f += r.centre;
    if constexpr (kGradient) gradient[i] = factor * r.gradient;
  }
  value += v;
  centre += f;
}

template <class Rule, bool kGradient, class T>
void finish(const RowTerms<T>& row, bool near, const Block<T>& block, int n, T factor, T* gradient, double& value,
            double& centre) {
  if (near && block.near)
    finish_block<Rule, true, kGradient>(row, block, n, factor, gradient, value, centre);
  else
    finish_block<Rule, false, kGradient>(row, block, n, factor, gradient, value, centre);
}

// Not inlined: one copy for forward and backward, which should round alike.
template <class Rule, bool kGradient, class T>
__attribute__((noinline)) void pass(const Row<T>& row, Block<T>& block, Mixture<T> mixture, T factor,
                                    Gradient<T> gradient, double& value, double& centre,
                                    const Label<T>* label = nullptr) {
  const bool near = Rule::softmax && near_row(row.stats);
  const RowTerms<T> terms = row_terms<Rule>(row.stats, row.tempering, mixture);
  for_blocks(row, block, [&](int64_t begin, int padded, int n) {
    const bool staged = label || padded != n || !gradient.in_place();
    T* out = !kGradient ? nullptr : staged ? block.staged : gradient.template as<T>() + begin;
    finish<Rule, kGradient>(terms, near, block, padded, factor, out, value, centre);
    if (!kGradient || !staged) return;
    if (label) label->add(block.a, begin, n, out);
    gradient.store(begin, out, n);
  });
}

template <class Rule, class T>
class Kernel {
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
    return {row, static_cast<const int64_t*>(labels_.labels)[r], scale, block};
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

  void forward(int64_t r, Block<T>& block) const {
    Row<T> row = this->row(r);
    std::optional<Label<T>> own;  // first: it brings the student's row into the cache
    if (labelled(r)) own = label(r, row, block);
    const Label<T>* label = own ? &*own : nullptr;
    block.whole = false;
    if (args_.phase == Phase::value) {
      take(r, row);
    } else if constexpr (Rule::softmax) {
      statistics<Rule::centred>(row, block, args_.phase == Phase::statistics);
    }
    if (args_.phase == Phase::statistics) return put(r, row, T(0));
    double value = 0, centre = 0, ignored = 0;
    // The centre of a part is not the row's yet.
    const Gradient<T> g = Rule::centred && args_.phase == Phase::value ? none() : gradient(r);
    if (g && !Rule::centred)
      pass<Rule, true>(row, block, mixture_, gradient_factor(r), g, value, centre, label);
    else
      pass<Rule, false>(row, block, mixture_, T(0), none(), value, centre);
    row.stats.centre = static_cast<T>(centre);
    if (g && Rule::centred) pass<Rule, true>(row, block, mixture_, gradient_factor(r), g, ignored, ignored, label);
    put(r, row, static_cast<T>(value * value_factor_ * scale(r)) + (label ? label->value() : T(0)));
  }

  void backward(int64_t r, Block<T>& block) const {
    Row<T> row = this->row(r);
    block.whole = false;
    take(r, row);
    double ignored = 0;
    pass<Rule, true>(row, block, mixture_, gradient_factor(r), gradient(r), ignored, ignored);
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
#pragma omp for schedule(dynamic, share)
    for (int64_t r = 0; r < args.rows; ++r) {
      if (kernel.keeps(r)) continue;
      if (kernel.scale(r) == 0) {
        kernel.zero(r, !kernel.labelled(r));
        if (kernel.labelled(r)) kernel.label_alone(r, block);
      } else if (args.loss)
        kernel.forward(r, block);
      else
        kernel.backward(r, block);
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
