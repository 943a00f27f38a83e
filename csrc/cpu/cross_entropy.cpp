// Cross entropy of rows of logits with their labels, added to what another loss has left (docs/losses.md, section 1).
//
// Bytes: the logits are read twice, the second time from the cache where a row fits, and the gradient is read and
// written once.
//
// With args.whole a row's other columns are elsewhere, and the largest logit of all is given with the sum of
// exp(z - largest) over all columns but that one. A label outside [0, V) is not here; the loss gets the label's
// distance from the largest logit, and log1p of that sum is still to be added. Without it such a label makes the row's
// loss and gradient NaN.
#include "../rules/cross_entropy_args.h"

#include <cmath>

#include "index.h"
#include "log_sum.h"

namespace fastdistil {
inline namespace FD_ISA {
namespace {

template <class T>
LogSum<T> softmax(const T* logits, int64_t columns) {
  LogSum<T> found;
  for (int64_t begin = 0; begin < columns; begin += kBlock)
    found.add(logits + begin, static_cast<int>(std::min<int64_t>(columns - begin, kBlock)), T(1));
  return found;
}

template <class T>
void row(const CrossEntropyArgs& args, int64_t r) {
  const T scale = static_cast<const T*>(args.row_scale)[r];
  if (scale == T(0)) return;
  const T* logits = static_cast<const T*>(args.logits) + r * args.logits_stride;
  const int64_t columns = args.columns, label = read_once(static_cast<const int64_t*>(args.labels) + r);
  const bool part = args.whole != nullptr, here = inside(label, columns);
  const T* whole = static_cast<const T*>(args.whole) + 2 * r;
  const LogSum<T> own = part ? LogSum<T>{whole[0], static_cast<double>(whole[1])} : softmax(logits, columns);
  T& loss = static_cast<T*>(args.loss)[r];
  const T z = here ? logits[label] : static_cast<T>(NAN);
  if (part)
    loss += here ? scale * (own.max - z) : T(0);
  else
    loss += static_cast<T>(scale * (own.log() + (own.max - z)));
  if (!args.gradient) return;
  T* gradient = static_cast<T*>(args.gradient) + r * args.gradient_stride;
  const T factor = part || here ? static_cast<T>(scale / own.sum()) : z, max = own.max;
  const T there = here ? gradient[label] + static_cast<T>(scale * own.slope(z)) : T(0);
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) gradient[i] += factor * math::exp_nonpositive(logits[i] - max);
  if (here) gradient[label] = there;
}

template <class T>
void run(const CrossEntropyArgs& args, int threads) {
  constexpr int64_t kShare = 4096;  // columns that are worth a thread's turn
  if (args.rows * args.columns <= kShare) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1 + kShare / (args.columns + 1))
  for (int64_t r = 0; r < args.rows; ++r) row<T>(args, r);
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args, int threads) {
  args.dtype == DType::f64 ? run<double>(args, threads) : run<float>(args, threads);
}

}  // namespace FD_ISA
}  // namespace fastdistil
