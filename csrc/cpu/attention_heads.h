// Which tokens of a head take part, and where they lie: shared by the tiled and the low-rank attention kernel.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "attention_args.h"
#include "elements.h"

namespace fastdistil {
inline namespace FD_ISA {

// Rows of one head of one sequence.
template <class E>
struct Head {
  const E* data;
  int64_t row_stride;
  const E* row(int64_t i) const { return data + i * row_stride; }
};

template <class E>
class Sequence {
  using T = Compute<E>;
  const AttentionArgs& args_;
  int64_t batch_, first_, length_;

 public:
  std::vector<int32_t> keys, rows;  // positions of the real keys, and of a head's query rows that count
  std::vector<int64_t> seen;        // how many of the keys each of the rows sees, never falling

  Sequence(const AttentionArgs& args, int64_t index) : args_(args) {
    const bool packed = !args.offsets.empty();
    batch_ = packed ? 0 : index, first_ = packed ? args.offsets[static_cast<size_t>(index)] : 0;
    length_ = packed ? args.offsets[static_cast<size_t>(index) + 1] - first_ : args.length;
    const T* real = args.real ? static_cast<const T*>(args.real) + batch_ * args.length + first_ : nullptr;
    for (int64_t i = 0; i < length_; ++i)
      if (!real || real[i] != T(0)) keys.push_back(static_cast<int32_t>(i));
  }

  int64_t n_keys() const { return static_cast<int64_t>(keys.size()); }
  int64_t n_rows() const { return static_cast<int64_t>(rows.size()); }
  int64_t key(int64_t i) const { return keys[static_cast<size_t>(i)]; }
  int64_t row(int64_t i) const { return rows[static_cast<size_t>(i)]; }
  int64_t sees(int64_t i) const { return seen[static_cast<size_t>(i)]; }

  // The query rows of a head that count and see a key; zeros in its values and gradients, for those that do not.
  void select_rows(int64_t head) {
    rows.clear(), seen.clear();
    int64_t sees = args_.causal ? 0 : n_keys();
    for (int64_t i = 0; i < length_; ++i) {
      while (args_.causal && sees < n_keys() && key(sees) <= i) ++sees;
      if (scale(head)[i] == T(0) || sees == 0) continue;
      rows.push_back(static_cast<int32_t>(i)), seen.push_back(sees);
    }
    std::fill_n(values(head), length_, T(0));
    if (args_.dq) std::fill_n(dq(head), length_ * args_.student_q.size, T(0));
  }

  Head<E> of(const HeadsArgs& x, int64_t head) const {
    return {static_cast<const E*>(x.data) + batch_ * x.batch_stride + head * x.head_stride + first_ * x.row_stride,
            x.row_stride};
  }
  const T* scale(int64_t head) const {
    return static_cast<const T*>(args_.row_scale) + offset(head, args_.student_q.heads);
  }
  T* values(int64_t head) const { return static_cast<T*>(args_.rows) + offset(head, args_.student_q.heads); }
  T* dq(int64_t head) const {
    return static_cast<T*>(args_.dq) + offset(head, args_.student_q.heads) * args_.student_q.size;
  }
  // Of a key head, with zeros where a token is no key.
  T* clear_dk(int64_t key_head) const {
    T* dk = static_cast<T*>(args_.dk) + offset(key_head, args_.student_k.heads) * args_.student_k.size;
    std::fill_n(dk, length_ * args_.student_k.size, T(0));
    return dk;
  }

 private:
  // Of a head's first row in a contiguous (B, heads, S).
  int64_t offset(int64_t head, int64_t heads) const { return (batch_ * heads + head) * args_.length + first_; }
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

// Runs kernel.run(sequence, key head) for each, a key head and the query heads that share it on one thread: every
// gradient has one writer. Make is called once a thread, with that thread's share of `each` elements of memory.
template <class T, class Make>
void for_key_heads(const AttentionArgs& args, int threads, int64_t each, Make&& make) {
  const int64_t items = sequences(args) * args.student_k.heads;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)));
  const std::unique_ptr<T[]> memory(new T[static_cast<size_t>(each * threads + Carver<T>::kLine)]);
  T* aligned = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
  int next = 0;
#pragma omp parallel num_threads(threads)
  {
    int mine;
#pragma omp atomic capture
    mine = next++;
    auto kernel = make(aligned + each * mine);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < items; ++i) kernel.run(i / args.student_k.heads, i % args.student_k.heads);
  }
}

// `run` with the element type as an argument.
template <class Run>
void with_element(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::bf16:
      return run(bf16{});
    case DType::f16:
      return run(f16{});
    case DType::f64:
      return run(double{});
  }
}

}  // namespace FD_ISA
}  // namespace fastdistil
