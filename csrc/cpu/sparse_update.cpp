// AdamW on some entries of many tensors (docs/losses.md, section 6).
//
// Bytes: memory comes in lines of 64 bytes. At a density of 8% 1 - 0.92^16 = 74% of them hold an entry, so the
// parameters are read and written and the gradients read almost whole, while indices and moments are 20 bytes an entry.
// For 109M parameters: 749 MB read and 393 MB written; AdamW on everything reads 1,752 and writes 1,314 MB.
//
// Compiled once an instruction set (FD_ISA); sparse_dispatch.cpp chooses at run time.
#include <algorithm>
#include <vector>

#include "../rules/sparse_rule.h"
#include "elements.h"
#include "index.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

// Entries that are gathered, updated and scattered together: few, so that the arithmetic of one block runs while the
// loads of the next wait. AVX-512, 109M parameters at 8%, 2 cores of an EPYC: 25 ms; 16, 64, 128 entries: 27, 27, 29
// ms; the same lines touched and nothing else: 21 ms.
constexpr int kEntriesBlock = 32;
// Entries: the lines that are asked for so far ahead (6 KB at 8%) arrive in time; 64 and 256 take as long, 0 more than
// twice as long.
constexpr int kAhead = 128;

template <class E, class I>
void prefetch(const E* param, const E* gradient, const I* index, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    __builtin_prefetch(param + index[i], 1, 2);
    __builtin_prefetch(gradient + index[i], 0, 2);
  }
}

// Positions are ascending, each once: the loops below have no dependences.
template <class E, class I, class T>
void gather(const E* tensor, const I* index, int n, T* values) {
#pragma omp simd
  for (int i = 0; i < n; ++i) values[i] = to_compute(tensor[index[i]]);
}

#if defined(__AVX512F__)
// GCC's generic tuning makes scatters of such loops but no gathers: 38 ms instead of 25.
inline void gather(const float* tensor, const int32_t* index, int n, float* values) {
  constexpr int kLanes = 16;
  for (int i = 0; i < n; i += kLanes) {
    const auto lanes = static_cast<__mmask16>(n - i < kLanes ? (1u << (n - i)) - 1 : 0xffffu);
    const __m512i at = _mm512_maskz_loadu_epi32(lanes, index + i);
    _mm512_mask_storeu_ps(values + i, lanes, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, at, tensor, 4));
  }
}
#endif

template <class E, class I, class T>
void scatter(const T* values, const I* index, int n, E* tensor) {
#pragma omp simd
  for (int i = 0; i < n; ++i) tensor[index[i]] = from_compute<E>(values[i]);
}

// Not inlined: one copy for all kinds of index, so that all of them round alike where products and sums are fused.
template <class T>
[[gnu::noinline]] void update_block(const AdamW<T>& rule, int n, const T* g, T* w, T* m, T* v) {
#pragma omp simd
  for (int i = 0; i < n; ++i) adamw(rule, g[i], w[i], m[i], v[i]);
}

// The positions of one block, read once: whoever writes them meanwhile makes no other element move. False where one is
// outside of the tensor.
template <class I>
bool positions_inside(const I* index, int n, int64_t size, I* at) {
  bool good = true;
  for (int i = 0; i < n; ++i) {
    at[i] = read_once(index + i);
    good &= inside(at[i], size);
  }
  return good;
}

// False where a position is outside of the tensor: the entries of its block stay as they are.
template <class E, class I>
bool update_chunk(const UpdateRow& row, const AdamW<Compute<E>>& rule, int64_t begin, int64_t end) {
  using T = Compute<E>;
  E* param = row.get<E>(kParam);
  const E* gradient = row.get<const E>(kGradient);
  const I* index = row.get<const I>(kIndex);
  T *exp_avg = row.get<T>(kExpAvg), *exp_avg_sq = row.get<T>(kExpAvgSq), *master = row.get<T>(kMaster);
  const T* base = row.get<const T>(kBase);
  T w[kEntriesBlock], g[kEntriesBlock];
  I at[kEntriesBlock];
  bool good = true;
  for (; begin < end; begin += kEntriesBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kEntriesBlock, end - begin));
    if (index) {
      prefetch(param, gradient, index + begin + kAhead, std::min<int64_t>(n, row.columns[kEntries] - begin - kAhead));
      if (!positions_inside(index + begin, n, row.columns[kSize], at)) {
        good = false;
        continue;
      }
      gather(param, at, n, w);
      gather(gradient, at, n, g);
    } else {
      for (int i = 0; i < n; ++i) w[i] = to_compute(param[begin + i]), g[i] = to_compute(gradient[begin + i]);
    }
    if (master)  // unless someone else has written the parameter since, its master knows it better
      for (int i = 0; i < n; ++i)
        if (to_compute(from_compute<E>(master[begin + i])) == w[i]) w[i] = master[begin + i];
    if (base)
      for (int i = 0; i < n; ++i) g[i] += pull(rule.l1, w[i], base[begin + i]);
    update_block(rule, n, g, w, exp_avg + begin, exp_avg_sq + begin);
    if (master) std::copy_n(w, n, master + begin);
    if (index)
      scatter(w, at, n, param);
    else
      for (int i = 0; i < n; ++i) param[begin + i] = from_compute<E>(w[i]);
  }
  return good;
}

template <class E>
bool update_range(const UpdateRow& row, const double* constants, int64_t begin, int64_t end) {
  const auto rule = AdamW<Compute<E>>::from(constants);
  return row.columns[kWide] ? update_chunk<E, int64_t>(row, rule, begin, end)
                            : update_chunk<E, int32_t>(row, rule, begin, end);
}

bool update_range(const UpdateRow& row, const double* constants, int64_t begin, int64_t end) {
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
  return false;
}

}  // namespace

bool sparse_update(const int64_t* table, const double* constants, int64_t tensors, int threads) {
  struct Work {
    int64_t tensor, begin, end;
  };
  std::vector<Work> work;
  for (int64_t t = 0; t < tensors; ++t) {
    const int64_t entries = table[t * kUpdateColumns + kEntries];
    for (int64_t b = 0; b < entries; b += kUpdateChunk) work.push_back({t, b, std::min(entries, b + kUpdateChunk)});
  }
  const int64_t items = static_cast<int64_t>(work.size());
  bool good = true;
#pragma omp parallel for num_threads(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)))) \
    schedule(dynamic, 4) reduction(&& : good)
  for (int64_t i = 0; i < items; ++i) {
    const Work& w = work[static_cast<size_t>(i)];
    const UpdateRow row{table + w.tensor * kUpdateColumns};
    good = update_range(row, constants + w.tensor * kUpdateConstants, w.begin, w.end) && good;
  }
  return good;
}

}  // namespace FD_ISA
}  // namespace fastdistil
