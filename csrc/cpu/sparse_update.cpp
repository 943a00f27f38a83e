// AdamW on some entries of many tensors (docs/losses.md, section 6).
//
// Bytes: memory comes in lines of 64 bytes. At a density of 8% three lines of four hold an entry, so the parameters are
// read and written and the gradients read almost whole, while indices and moments are 20 bytes an entry.
//
// Compiled once an instruction set (FD_ISA); sparse_dispatch.cpp chooses at run time.
#include <algorithm>
#include <vector>

#include "../rules/sparse_rule.h"
#include "elements.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

constexpr int64_t kUpdateChunk = 1 << 13;  // entries that a thread takes at a time

struct UpdateRow {
  const int64_t* columns;
  template <class P>
  P* get(UpdateColumn column) const {
    return reinterpret_cast<P*>(columns[column]);
  }
};

constexpr int kEntriesBlock = 128;
// Entries: the lines that are asked for so far ahead (6 KB at 8%) arrive in time. 110M parameters on 2 cores of an
// EPYC: 46 ms without, 25 ms with.
constexpr int kAhead = 128;

// The entries' parameters and gradients; `left` entries follow from here in the whole tensor.
template <class E, class I, class T>
void gather(const E* param, const E* gradient, const I* index, int n, int64_t left, T* w, T* g) {
  const int asked = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(n, left - kAhead)));
  int i = 0;
  for (; i < asked; ++i) {
    __builtin_prefetch(param + index[i + kAhead], 1, 2);
    __builtin_prefetch(gradient + index[i + kAhead], 0, 2);
    w[i] = to_compute(param[index[i]]), g[i] = to_compute(gradient[index[i]]);
  }
  for (; i < n; ++i) w[i] = to_compute(param[index[i]]), g[i] = to_compute(gradient[index[i]]);
}

template <class E, class I>
void update_chunk(const UpdateRow& row, const AdamW<Compute<E>>& rule, int64_t begin, int64_t end) {
  using T = Compute<E>;
  E* param = row.get<E>(kParam);
  const E* gradient = row.get<const E>(kGradient);
  const I* index = row.get<const I>(kIndex);
  T *exp_avg = row.get<T>(kExpAvg), *exp_avg_sq = row.get<T>(kExpAvgSq), *master = row.get<T>(kMaster);
  const T* base = row.get<const T>(kBase);
  T w[kEntriesBlock], g[kEntriesBlock];
  for (; begin < end; begin += kEntriesBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kEntriesBlock, end - begin));
    if (index)
      gather(param, gradient, index + begin, n, row.columns[kEntries] - begin, w, g);
    else
      for (int i = 0; i < n; ++i) w[i] = to_compute(param[begin + i]), g[i] = to_compute(gradient[begin + i]);
    if (master)  // unless someone else has written the parameter since, its master knows it better
      for (int i = 0; i < n; ++i)
        if (to_compute(from_compute<E>(master[begin + i])) == w[i]) w[i] = master[begin + i];
    if (base)
      for (int i = 0; i < n; ++i) g[i] += pull(rule.l1, w[i], base[begin + i]);
    T *m = exp_avg + begin, *v = exp_avg_sq + begin;
#pragma omp simd
    for (int i = 0; i < n; ++i) adamw(rule, g[i], w[i], m[i], v[i]);
    if (master) std::copy_n(w, n, master + begin);
    if (index)
      for (int i = 0; i < n; ++i) param[index[begin + i]] = from_compute<E>(w[i]);
    else
      for (int i = 0; i < n; ++i) param[begin + i] = from_compute<E>(w[i]);
  }
}

template <class E>
void update_range(const UpdateRow& row, const double* constants, int64_t begin, int64_t end) {
  const auto rule = AdamW<Compute<E>>::from(constants);
  if (row.columns[kWide])
    update_chunk<E, int64_t>(row, rule, begin, end);
  else
    update_chunk<E, int32_t>(row, rule, begin, end);
}

void update_range(const UpdateRow& row, const double* constants, int64_t begin, int64_t end) {
  switch (static_cast<DType>(row.columns[kDType])) {
    case DType::f32:
      return update_range<float>(row, constants, begin, end);
    case DType::bf16:
      return update_range<bf16>(row, constants, begin, end);
    case DType::f16:
      return update_range<f16>(row, constants, begin, end);
    case DType::f64:
      return update_range<double>(row, constants, begin, end);
  }
}

}  // namespace

void sparse_update(const int64_t* table, const double* constants, int64_t tensors, int threads) {
  struct Work {
    int64_t tensor, begin, end;
  };
  std::vector<Work> work;
  for (int64_t t = 0; t < tensors; ++t) {
    const int64_t entries = table[t * kUpdateColumns + kEntries];
    for (int64_t b = 0; b < entries; b += kUpdateChunk) work.push_back({t, b, std::min(entries, b + kUpdateChunk)});
  }
  const int64_t items = static_cast<int64_t>(work.size());
#pragma omp parallel for num_threads(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)))) \
    schedule(dynamic, 4)
  for (int64_t i = 0; i < items; ++i) {
    const Work& w = work[static_cast<size_t>(i)];
    update_range(UpdateRow{table + w.tensor * kUpdateColumns}, constants + w.tensor * kUpdateConstants, w.begin, w.end);
  }
}

}  // namespace FD_ISA
}  // namespace fastdistil
