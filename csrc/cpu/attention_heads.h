// Which tokens of a head take part, and where they lie: shared by the tiled and the low-rank attention kernel.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "attention_args.h"
#include "elements.h"

namespace fastdistil {
inline namespace FD_ISA {

// Rows of one head of one sequence, in the type that is computed in: 16-bit rows are converted into `room` one by one,
// which costs nothing beside their products and saves every kernel two more instances.
template <class T>
class Head {
  const char* data_;
  int64_t row_bytes_, size_;
  DType dtype_;
  T* room_;  // null where nothing is converted

 public:
  static constexpr int64_t kRows = 16;  // of `room`: as many as are held at once

  Head(const char* data, const HeadsArgs& x, DType dtype, T* room)
      : data_(data), row_bytes_(x.row_stride * bytes_of(dtype)), size_(x.size), dtype_(dtype), room_(room) {}

  // Until the next call with the same slot.
  const T* row(int64_t i, int64_t slot = 0) const {
    const char* at = data_ + i * row_bytes_;
    return room_ ? converted(at, room_ + slot * size_) : reinterpret_cast<const T*>(at);
  }

 private:
  __attribute__((noinline)) const T* converted(const char* at, T* out) const {
    if (dtype_ == DType::bf16)
      load(reinterpret_cast<const bf16*>(at), out);
    else
      load(reinterpret_cast<const f16*>(at), out);
    return out;
  }

  template <class E>
  void load(const E* source, T* out) const {
#pragma omp simd
    for (int64_t j = 0; j < size_; ++j) out[j] = to_compute(source[j]);
  }
};

// Where a sequence lies.
struct Span {
  int64_t batch, first, length;  // first row of `length` in batch entry `batch`

  Span(const AttentionArgs& args, int64_t sequence) : batch(sequence), first(0), length(args.length) {
    if (args.offsets.empty()) return;
    batch = 0, first = args.offsets[static_cast<size_t>(sequence)];
    length = args.offsets[static_cast<size_t>(sequence) + 1] - first;
  }

  const char* of(const HeadsArgs& x, int64_t head, DType dtype) const {
    const int64_t elements = batch * x.batch_stride + head * x.head_stride + first * x.row_stride;
    return static_cast<const char*>(x.data) + elements * bytes_of(dtype);
  }
};

// A key head of a sequence, with the query heads that share it; sequence -1: none.
struct Item {
  int64_t sequence, key_head;
};

// Asks for the inputs of the next item while the products of this one run: packing them would wait for memory.
class Ahead {
  static constexpr int64_t kMostBytes = 256 * 1024, kLine = 64;  // a part of an L2 cache of 1 MiB
  struct Rows {
    const char* at;
    int64_t stride, bytes;
  } rows_[4]{};
  int64_t left_ = 0;

 public:
  Ahead(const AttentionArgs& args, const Item& next) {
    if (next.sequence < 0) return;
    const Span span(args, next.sequence);
    const int64_t group_s = args.student_q.heads / args.student_k.heads;
    const int64_t group_t = args.teacher_q.heads / args.teacher_k.heads, first = next.key_head * group_s;
    int64_t bytes = 0;
    const auto aim = [&](Rows& rows, const HeadsArgs& x, int64_t head) {
      const int64_t size = bytes_of(args.dtype);
      rows = {span.of(x, head, args.dtype), x.row_stride * size, x.size * size};
      bytes += rows.bytes;
    };
    aim(rows_[0], args.student_k, next.key_head), aim(rows_[1], args.teacher_k, first / group_t);
    aim(rows_[2], args.student_q, first), aim(rows_[3], args.teacher_q, first);
    left_ = std::min(span.length, kMostBytes / bytes);
  }

  void fetch(int64_t n) {
    for (; n > 0 && left_ > 0; --n, --left_)
      for (Rows& rows : rows_) {
        for (int64_t i = 0; i < rows.bytes; i += kLine) __builtin_prefetch(rows.at + i, 0, 2);
        rows.at += rows.stride;
      }
  }
};

template <class T>
class Sequence {
  const AttentionArgs& args_;
  const Span span_;
  mutable std::vector<T> room_;  // of 16-bit inputs: each of the four has its own rows

 public:
  std::vector<int32_t> keys, rows;  // positions of the real keys, and of a head's query rows that count
  std::vector<int64_t> seen;        // how many of the keys each of the rows sees, never falling

  Sequence(const AttentionArgs& args, int64_t index) : args_(args), span_(args, index) {
    const T* real = args.real ? static_cast<const T*>(args.real) + span_.batch * args.length + span_.first : nullptr;
    for (int64_t i = 0; i < span_.length; ++i)
      if (!real || real[i] != T(0)) keys.push_back(static_cast<int32_t>(i));
    if (bytes_of(args.dtype) == 2) room_.resize(static_cast<size_t>(4 * room_each()));
  }

  int64_t n_keys() const { return static_cast<int64_t>(keys.size()); }
  int64_t n_rows() const { return static_cast<int64_t>(rows.size()); }
  int64_t key(int64_t i) const { return keys[static_cast<size_t>(i)]; }
  int64_t row(int64_t i) const { return rows[static_cast<size_t>(i)]; }
  int64_t sees(int64_t i) const { return seen[static_cast<size_t>(i)]; }

  // The query rows of a head that count and see a key; zeros in its values and gradients for those that do not.
  void select_rows(int64_t head) {
    rows.clear(), seen.clear();
    int64_t sees = args_.causal ? 0 : n_keys();
    for (int64_t i = 0; i < span_.length; ++i) {
      while (args_.causal && sees < n_keys() && key(sees) <= i) ++sees;
      if (scale(head)[i] == T(0) || sees == 0) {
        values(head)[i] = T(0);
        if (args_.dq) std::fill_n(dq(head) + i * args_.student_q.size, args_.student_q.size, T(0));
        continue;
      }
      rows.push_back(static_cast<int32_t>(i)), seen.push_back(sees);
    }
  }

  // x: one of the arguments' four.
  Head<T> of(const HeadsArgs& x, int64_t head) const {
    const int64_t which = &x == &args_.student_q ? 0 : &x == &args_.student_k ? 1 : &x == &args_.teacher_q ? 2 : 3;
    return {span_.of(x, head, args_.dtype), x, args_.dtype,
            room_.empty() ? nullptr : room_.data() + which * room_each()};
  }
  const T* scale(int64_t head) const {
    return static_cast<const T*>(args_.row_scale) + offset(head, args_.student_q.heads);
  }
  T* values(int64_t head) const { return static_cast<T*>(args_.rows) + offset(head, args_.student_q.heads); }
  T* dq(int64_t head) const {
    return static_cast<T*>(args_.dq) + offset(head, args_.student_q.heads) * args_.student_q.size;
  }
  T* dk(int64_t key_head) const {
    return static_cast<T*>(args_.dk) + offset(key_head, args_.student_k.heads) * args_.student_k.size;
  }
  // Zeros in dk where a token is no key, and everywhere if `all`.
  void clear_dk(int64_t key_head, bool all) const {
    const int64_t size = args_.student_k.size;
    for (int64_t i = 0, next = 0; i < span_.length; ++i) {
      const bool kept = next < n_keys() && key(next) == i;
      next += kept;
      if (all || !kept) std::fill_n(dk(key_head) + i * size, size, T(0));
    }
  }

 private:
  int64_t room_each() const { return Head<T>::kRows * std::max(args_.student_q.size, args_.teacher_q.size); }
  // Of a head's first row in a contiguous (B, heads, S).
  int64_t offset(int64_t head, int64_t heads) const {
    return (span_.batch * heads + head) * args_.length + span_.first;
  }
};

inline int64_t sequences(const AttentionArgs& args) {
  return args.offsets.empty() ? args.batch : static_cast<int64_t>(args.offsets.size()) - 1;
}

inline int64_t longest(const AttentionArgs& args) {
  if (args.offsets.empty()) return args.length;
  int64_t found = 0;
  for (size_t i = 1; i < args.offsets.size(); ++i) found = std::max(found, args.offsets[i] - args.offsets[i - 1]);
  return found;
}

// Buffers side by side, each on a cache line of its own; with null memory only their size is found.
template <class T>
struct Carver {
  T* memory;
  int64_t used = 0;
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

  void take(T*& buffer, int64_t n) {
    if (memory) buffer = memory + used;
    used += (n + kLine - 1) / kLine * kLine;
  }
};

// Runs kernel.run(item, the thread's next item) for each, a key head and the query heads that share it on one thread:
// every gradient has one writer. Make is called once a thread, with that thread's share of `each` elements of memory.
template <class T, class Make>
void for_key_heads(const AttentionArgs& args, int threads, int64_t each, Make&& make) {
  const int64_t heads = args.student_k.heads, items = sequences(args) * heads;
  const auto item = [=](int64_t i) { return i < items ? Item{i / heads, i % heads} : Item{-1, 0}; };
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)));
  const std::unique_ptr<T[]> memory(new T[static_cast<size_t>(each * threads + Carver<T>::kLine)]);
  T* aligned = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
  int64_t taken = 0;
  const auto take = [&taken] {
    int64_t mine;
#pragma omp atomic capture
    mine = taken++;
    return mine;
  };
#pragma omp parallel num_threads(threads)
  {
    int64_t mine = take();
    auto kernel = make(aligned + each * mine);
#pragma omp barrier  // the first items are the numbers of the shares of memory
    for (int64_t next; mine < items; mine = next) {
      next = take();
      kernel.run(item(mine), item(next));
    }
  }
}

// `run` with the type that is computed in as an argument.
template <class Run>
void with_compute(DType dtype, Run&& run) {
  if (dtype == DType::f64)
    run(double{});
  else
    run(float{});
}

}  // namespace FD_ISA
}  // namespace fastdistil
