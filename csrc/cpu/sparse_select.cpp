// The largest changes of a model (docs/losses.md, section 6): a radix select on the bits of |change|.
//
// Bytes: both models are read three times (two histograms, one compaction) and the indices written once; the floor is
// 3 x 2 x bytes of the model over the read bandwidth.
//
// Compiled once an instruction set (FD_ISA); sparse_dispatch.cpp chooses at run time.
#include <algorithm>
#include <atomic>
#include <memory>

#include "../rules/sparse_rule.h"
#include "elements.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

constexpr int kBlock = 1024;         // elements: bits and both inputs, converted, stay in L1
constexpr int64_t kChunk = 1 << 16;  // elements a thread takes at a time: both float32 inputs fit in L2
constexpr int kCopies = 4;           // of a thread's first histogram: equal neighbours do not wait for each other

template <class E, class T>
const T* convert(const void* source, int64_t begin, int n, T* buffer) {
  const E* from = static_cast<const E*>(source) + begin;
  if constexpr (std::is_same_v<E, T>) {
    return from;
  } else {
    for (int i = 0; i < n; ++i) buffer[i] = static_cast<T>(to_compute(from[i]));
    return buffer;
  }
}

template <class T>
const T* load(const void* source, DType dtype, int64_t begin, int n, T* buffer) {
  switch (dtype) {
    case DType::f32:
      return convert<float>(source, begin, n, buffer);
    case DType::bf16:
      return convert<bf16>(source, begin, n, buffer);
    case DType::f16:
      return convert<f16>(source, begin, n, buffer);
    case DType::f64:
      return convert<double>(source, begin, n, buffer);
  }
  return nullptr;
}

// Bits of |change| of up to kBlock elements, and the largest of them.
class Bits {
 public:
  uint32_t bits[kBlock];

  uint32_t read(const ChangeArgs& args, int64_t begin, int n) {
    const bool wide = args.param_dtype == DType::f64 || args.base_dtype == DType::f64;
    return wide ? fill(args, begin, n, doubles_) : fill(args, begin, n, floats_);
  }

 private:
  float floats_[2][kBlock];
  double doubles_[2][kBlock];

  template <class T>
  uint32_t fill(const ChangeArgs& args, int64_t begin, int n, T (&buffers)[2][kBlock]) {
    const T* a = load(args.param, args.param_dtype, begin, n, buffers[0]);
    const T* b = load(args.base, args.base_dtype, begin, n, buffers[1]);
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < n; ++i) {
      bits[i] = change_bits(a[i], b[i]);
      largest = bits[i] > largest ? bits[i] : largest;
    }
    return largest;
  }
};

int threads_for(int64_t size, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, (size + kChunk - 1) / kChunk)));
}

// Calls action(block, begin, n, largest) for the blocks of one chunk.
template <class Action>
void for_blocks(const ChangeArgs& args, int64_t chunk, Bits& block, Action&& action) {
  const int64_t end = std::min(args.size, (chunk + 1) * kChunk);
  for (int64_t begin = chunk * kChunk; begin < end; begin += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, end - begin));
    const uint32_t largest = block.read(args, begin, n);
    action(begin, n, largest);
  }
}

void add(int64_t* counts, int64_t at, int64_t n) { __atomic_fetch_add(counts + at, n, __ATOMIC_RELAXED); }

// Upper bits of one chunk; a thread's own counters are added to the common ones once a chunk.
bool high_chunk(const ChangeArgs& args, int64_t chunk, Bits& block, uint32_t* own, int64_t* counts) {
  std::fill_n(own, kCopies * kHighBuckets, 0u);
  bool nan = false;
  for_blocks(args, chunk, block, [&](int64_t, int n, uint32_t largest) {
    nan |= largest > kInfinityBits;
    int i = 0;
    for (; i + kCopies <= n; i += kCopies)
      for (int c = 0; c < kCopies; ++c) ++own[c * kHighBuckets + (block.bits[i + c] >> kLowBits)];
    for (; i < n; ++i) ++own[block.bits[i] >> kLowBits];
  });
  for (int64_t b = 0; b < kHighBuckets; ++b) {
    int64_t sum = 0;
    for (int c = 0; c < kCopies; ++c) sum += own[c * kHighBuckets + b];
    if (sum) add(counts, b, sum);
  }
  return nan;
}

// Lower bits of those in one bucket of the upper ones: some percent, so the table of 2^20 is shared, and equal
// neighbours (a tensor that never changed) are counted before they are added.
void low_chunk(const ChangeArgs& args, int64_t chunk, Bits& block, int64_t bucket, int64_t* counts) {
  const uint32_t wanted = static_cast<uint32_t>(bucket);
  for_blocks(args, chunk, block, [&](int64_t, int n, uint32_t largest) {
    if ((largest >> kLowBits) < wanted) return;
    uint32_t found[kBlock];
    int m = 0;
    for (int i = 0; i < n; ++i) {
      found[m] = block.bits[i] & (kLowBuckets - 1);
      m += (block.bits[i] >> kLowBits) == wanted;
    }
    for (int i = 0; i < m;) {
      int end = i + 1;
      while (end < m && found[end] == found[i]) ++end;
      add(counts, found[i], end - i);
      i = end;
    }
  });
}

// Positions in one chunk whose bits reach the threshold, relative to the chunk's begin; `ties` of them are at it.
int find(const ChangeArgs& args, int64_t chunk, uint32_t threshold, Bits& block, int32_t* positions, int64_t& ties) {
  int found = 0;
  ties = 0;
  for_blocks(args, chunk, block, [&](int64_t begin, int n, uint32_t largest) {
    if (largest < threshold) return;
    const int32_t first = static_cast<int32_t>(begin - chunk * kChunk);
    int equal = 0;
#pragma omp simd reduction(+ : equal)
    for (int i = 0; i < n; ++i) equal += block.bits[i] == threshold;
    for (int i = 0; i < n; ++i) {
      positions[found] = first + i;
      found += block.bits[i] >= threshold;
    }
    ties += equal;
  });
  return found;
}

// Drops the ties behind the first `keep` of them.
int drop_ties(const ChangeArgs& args, int64_t chunk, uint32_t threshold, Bits& block, int32_t* positions, int found,
              int64_t keep) {
  int kept = 0, at = 0;
  for_blocks(args, chunk, block, [&](int64_t begin, int n, uint32_t) {
    const int64_t first = begin - chunk * kChunk;
    for (; at < found && positions[at] < first + n; ++at) {
      const bool tie = block.bits[positions[at] - first] == threshold;
      if (tie && keep-- <= 0) continue;
      positions[kept++] = positions[at];
    }
  });
  return kept;
}

template <class I>
void write(void* out, int64_t at, int64_t first, const int32_t* positions, int n) {
  I* target = static_cast<I*>(out) + at;
  for (int i = 0; i < n; ++i) target[i] = static_cast<I>(first + positions[i]);
}

}  // namespace

bool sparse_histogram(const ChangeArgs& args, int64_t* counts, int64_t bucket, int threads) {
  const int64_t chunks = (args.size + kChunk - 1) / kChunk;
  std::atomic<bool> nan{false};
#pragma omp parallel num_threads(threads_for(args.size, threads))
  {
    const auto block = std::make_unique<Bits>();
    const auto own = std::make_unique<uint32_t[]>(bucket == kAllBuckets ? kCopies * kHighBuckets : 1);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      if (bucket != kAllBuckets)
        low_chunk(args, c, *block, bucket, counts);
      else if (high_chunk(args, c, *block, own.get(), counts))
        nan = true;
    }
  }
  return nan;
}

Compacted sparse_compact(const CompactArgs& args, int threads) {
  const int64_t chunks = (args.change.size + kChunk - 1) / kChunk;
  Compacted done{0, 0};
  bool overflow = false;
  std::atomic<bool> changed{false};
#pragma omp parallel num_threads(threads_for(args.change.size, threads))
  {
    const auto block = std::make_unique<Bits>();
    const auto positions = std::make_unique<int32_t[]>(kChunk);
#pragma omp for ordered schedule(static, 1)
    for (int64_t c = 0; c < chunks; ++c) {
      int64_t ties = 0, at = 0, keep = 0;
      int found = find(args.change, c, args.threshold, *block, positions.get(), ties);
      bool fits = false;
#pragma omp ordered
      {
        keep = std::min(ties, args.ties - done.ties);
        at = done.count;
        done.ties += keep;
        done.count += found - ties + keep;
        fits = !args.out || done.count <= args.capacity;
        overflow |= !fits;
      }
      if (!args.out || !fits) continue;
      const int counted = static_cast<int>(found - ties + keep);
      if (keep < ties) found = drop_ties(args.change, c, args.threshold, *block, positions.get(), found, keep);
      if (found != counted) changed = true, found = std::min(found, counted);  // someone writes the tensor meanwhile
      if (args.wide)
        write<int64_t>(args.out, at, c * kChunk, positions.get(), found);
      else
        write<int32_t>(args.out, at, c * kChunk, positions.get(), found);
    }
  }
  return overflow || changed ? Compacted{-1, 0} : done;
}

}  // namespace FD_ISA
}  // namespace fastdistil
