// A row pair of logits as blocks of scores: what the passes of logit.cpp loop over.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../rules/logit_args.h"
#include "../rules/pair.h"
#include "elements.h"
#include "log_sum.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

constexpr int kLanes = 16;  // floats of the widest vector: blocks are padded to a multiple, so that no loop has a tail

// A row of logits, or of their gradient, in a dtype that is known at run time alone: a kernel for each would compile
// for minutes, and conversion into a buffer in the L1 cache costs next to nothing.
template <class T, class Data>
struct Line {
  Data* data;  // void, const or not
  DType dtype;

  bool in_place() const { return dtype == DType::f32 || dtype == DType::f64; }

  // action(pointer to the elements as what they are)
  template <class Action>
  auto with_type(Action&& action) const {
    if constexpr (std::is_same_v<T, float>) {
      if (dtype == DType::bf16) return action(as<bf16>());
      if (dtype == DType::f16) return action(as<f16>());
    }
    return action(as<T>());
  }

  template <class E>
  auto as() const {
    return static_cast<std::conditional_t<std::is_const_v<Data>, const E, E>*>(data);
  }
};

template <class T>
struct Logits : Line<T, const void> {
  T operator[](int64_t i) const {
    return this->with_type([i](const auto* z) -> T { return to_compute(z[i]); });
  }

  // n of them: where they lie, or in the buffer.
  const T* load(int64_t begin, int n, T* buffer) const {
    return this->with_type([=](const auto* z) -> const T* { return load_block(z + begin, buffer, n); });
  }
};

template <class T>
struct Gradient : Line<T, void> {
  explicit operator bool() const { return this->data != nullptr; }

  void store(int64_t begin, const T* from, int n) const {
    this->with_type([=](auto* g) { store_block(from, g + begin, n); });
  }

  // Fetches the lines of what will be written: while something is computed, that costs no time.
  void prefetch(int64_t begin, int n) const {
    const int64_t item = bytes_of(this->dtype);
    const char* place = static_cast<const char*>(this->data) + begin * item;
    for (int64_t i = 0; i < n * item; i += 64) __builtin_prefetch(place + i, 1);
  }

  void zero(int64_t columns) const {
    this->with_type([=](auto* g) { std::fill_n(g, columns, std::remove_pointer_t<decltype(g)>{}); });
  }
};

template <class T>
struct Row {
  Logits<T> student, teacher;
  int64_t columns;
  Tempering<T> tempering;
  RowStats<T> stats;
};

template <class T>
struct Block {
  const T *a, *b;  // logits of student and teacher as they are: where they lie, or in the buffers
  T d[kBlock];     // their scores' differences
  T student[kBlock], teacher[kBlock];
  T staged[kBlock];            // a gradient that is not written where it belongs
  T p[kBlock], slope[kBlock];  // of a centred rule
  bool near;                   // every |d| is small
  bool whole = false;          // what is loaded is all of the row that is worked on

  // Returns how many columns there are now; those behind the row's end have no mass on either side.
  int load(const Row<T>& row, int64_t begin, int n) {
    const int padded = load_logits(row, begin, n);
    subtract(row, padded);
    whole = n == row.columns;
    return padded;
  }

  // The same, unless all of the row has been loaded before.
  int padded(const Row<T>& row, int64_t begin, int n) {
    return whole ? (n + kLanes - 1) / kLanes * kLanes : load(row, begin, n);
  }

  // The same without the differences, of two rows of logits.
  int load_logits(const Row<T>& row, int64_t begin, int n) {
    a = row.student.load(begin, n, student);
    b = row.teacher.load(begin, n, teacher);
    return pad(n, row.tempering.given);
  }

  void subtract(const Row<T>& row, int padded) {
    switch (form_of(row.tempering)) {
      case Form::plain:
        near = subtract<Form::plain, true>(row.tempering, padded) || subtract<Form::plain>(row.tempering, padded);
        break;
      case Form::shifted:
        near = subtract<Form::shifted, true>(row.tempering, padded) || subtract<Form::shifted>(row.tempering, padded);
        break;
      case Form::tempered:
        near = subtract<Form::tempered>(row.tempering, padded);
        break;
      case Form::given:
        near = subtract<Form::given>(row.tempering, padded);
        add(padded);
    }
  }

  Scores<T> at(int i) const { return {a[i], b[i], d[i]}; }

 private:
  int pad(int n, bool given) {
    const int padded = (n + kLanes - 1) / kLanes * kLanes;
    if (padded == n) return n;
    if (a != student) std::copy(a, a + n, student), std::copy(b, b + n, teacher);
    for (int i = n; i < padded; ++i) teacher[i] = -INFINITY, student[i] = given ? T(0) : -INFINITY;
    a = student, b = teacher;
    return padded;
  }

  // The student's logits from a given difference.
  void add(int n) {
    const T *zs = a, *zt = b;
#pragma omp simd
    for (int i = 0; i < n; ++i) student[i] = zt[i] + zs[i];
    a = student;
  }

  template <Form kForm, bool kFinite = false>
  bool subtract(const Tempering<T>& row, int n) {
    const T *zs = a, *zt = b;
    int far = 0;
#pragma omp simd reduction(| : far)
    for (int i = 0; i < n; ++i) {
      const T x = score_difference<kForm, kFinite>(zs[i], zt[i], row);
      d[i] = x;
      far |= !(math::magnitude(x) <= T(kNear));
    }
    return far == 0;
  }
};

// Two numbers a column that a pass keeps for the next one, which then needs no exponential.
template <class T>
class Kept {
  std::unique_ptr<T[]> memory_;
  std::vector<Unit<T>> units_;
  int64_t columns_;

 public:
  Gradient<T> gradient{};  // of the row, where one is wanted

  // Whole blocks: a pass writes padded columns.
  explicit Kept(int64_t columns) : columns_((columns + kBlock - 1) / kBlock * kBlock) {
    if (columns_ > 0) memory_.reset(new T[2 * columns_]), units_.resize(columns_ / kBlock);
  }
  Unit<T>& unit(int64_t begin) { return units_[begin / kBlock]; }  // what a block's columns are measured by
  T* first(int64_t begin) const { return memory_.get() + begin; }
  T* second(int64_t begin) const { return memory_.get() + columns_ + begin; }
};

// action(from, to): parts of a block whose sums stay in a float.
template <class Action>
inline __attribute__((always_inline)) void for_parts(int n, Action&& action) {
  if constexpr (kSummed == kBlock) return action(0, n);
  for (int from = 0; from < n; from += kSummed) action(from, std::min(n, from + kSummed));
}

// The student's logits as they are, n of them: where they lie, or in one of the block's buffers.
template <class T>
const T* own_logits(const Row<T>& row, int64_t begin, int n, Block<T>& block) {
  const T* own = row.student.load(begin, n, block.student);
  if (!row.tempering.given) return own;
  const T* teacher = row.teacher.load(begin, n, block.teacher);
#pragma omp simd
  for (int i = 0; i < n; ++i) block.student[i] = teacher[i] + own[i];
  return block.student;
}

// action(begin, columns)
template <class T, class Action>
void for_columns(const Row<T>& row, Action&& action) {
  for (int64_t begin = 0; begin < row.columns; begin += kBlock)
    action(begin, static_cast<int>(std::min<int64_t>(row.columns - begin, kBlock)));
}

// action(begin, padded columns, columns); a row of one block is loaded once.
template <class T, class Action>
void for_blocks(const Row<T>& row, Block<T>& block, Action&& action) {
  for_columns(row, [&](int64_t begin, int n) { action(begin, block.padded(row, begin, n), n); });
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fastdistil
