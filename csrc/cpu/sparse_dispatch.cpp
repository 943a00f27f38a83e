#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "index.h"
#include "sparse.h"

#define FD_DECLARE(isa)                                             \
  namespace isa {                                                   \
  bool sparse_histogram(const ChangeArgs&, int64_t*, int64_t, int); \
  Compacted sparse_compact(const CompactArgs&, int);                \
  bool sparse_update(const int64_t*, const double*, int64_t, int);  \
  }

namespace fastdistil {
#if defined(FD_X86)
FD_DECLARE(avx512)
FD_DECLARE(avx2)
#endif
FD_DECLARE(generic)

namespace cpu {
namespace {

struct Kernels {
  const char* name;
  decltype(generic::sparse_histogram)* histogram;
  decltype(generic::sparse_compact)* compact;
  decltype(generic::sparse_update)* update;
};

constexpr Kernels kAll[] = {
#if defined(FD_X86)
    {"avx512", avx512::sparse_histogram, avx512::sparse_compact, avx512::sparse_update},
    {"avx2", avx2::sparse_histogram, avx2::sparse_compact, avx2::sparse_update},
#endif
    {"generic", generic::sparse_histogram, generic::sparse_compact, generic::sparse_update},
};

// The kernels of the instruction set that isa() names.
const Kernels& chosen() {
  for (const Kernels& kernels : kAll)
    if (std::string(kernels.name) == isa()) return kernels;
  throw std::logic_error("sparse: no kernels for this instruction set");
}

template <bool kPut, class W, class I>
bool move(const MoveArgs& args, int threads) {
  W *tensor = static_cast<W*>(args.tensor), *values = static_cast<W*>(args.values);
  const I* index = static_cast<const I*>(args.index);
  bool good = true;
#pragma omp parallel for num_threads(args.entries < (1 << 15) ? 1 : threads) schedule(static) reduction(&& : good)
  for (int64_t i = 0; i < args.entries; ++i) {
    const int64_t at = read_once(index + i);
    if (!inside(at, args.size))
      good = false;
    else if (kPut)
      tensor[at] = values[i];
    else
      values[i] = tensor[at];
  }
  return good;
}

template <bool kPut, class W>
bool move(const MoveArgs& args, int threads) {
  return args.wide ? move<kPut, W, int64_t>(args, threads) : move<kPut, W, int32_t>(args, threads);
}

template <bool kPut>
bool move(const MoveArgs& args, int threads) {
  if (args.itemsize == 2) return move<kPut, uint16_t>(args, threads);
  if (args.itemsize == 4) return move<kPut, uint32_t>(args, threads);
  return move<kPut, uint64_t>(args, threads);
}

}  // namespace

bool sparse_take(const MoveArgs& args, int threads) { return move<false>(args, threads); }
bool sparse_put(const MoveArgs& args, int threads) { return move<true>(args, threads); }

bool sparse_histogram(const ChangeArgs& args, int64_t* counts, int64_t bucket, int threads) {
  return chosen().histogram(args, counts, bucket, threads);
}
Compacted sparse_compact(const CompactArgs& args, int threads) { return chosen().compact(args, threads); }
bool sparse_update(const int64_t* table, const double* constants, int64_t tensors, int threads) {
  return chosen().update(table, constants, tensors, threads);
}

}  // namespace cpu
}  // namespace fastdistil
