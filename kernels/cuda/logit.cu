// Divergence of two rows of logits, value and gradient: one thread block a row, each logit read twice. On sm_90 whole
// rows that fit on the chip go to logit_cluster.cu, which reads them once; what remains here reads them once by itself
// (mse, the backward), is a part of a vocabulary, float64, has two temperatures, or runs on sm_80.
//
// Floor: (2 reads + 1 write) x N x V x bytes an element over the copy bandwidth if both rows stayed on chip between the
// passes; this form reads them again (from L2 where they fit), a centred rule a third time. The mathematics is
// csrc/rules/, the same headers that the CPU kernel compiles.
#include <atomic>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "rows.h"

namespace fastdistil {
namespace {

constexpr int kMostThreads = 512;
// A thread of float64 needs more registers than the 128 that 512 of them leave it.
template <class E>
constexpr int kThreads = std::is_same_v<E, double> ? 256 : kMostThreads;

// Calls action(column, student, teacher) for this thread's share of the row: 16-byte loads on the part of the row where
// both pointers are aligned, single elements before and behind it (an odd V moves the alignment from row to row).
template <class E, class Action>
__device__ void for_columns(const E* student, const E* teacher, int64_t columns, Action&& action) {
  constexpr int kPack = Pack<E>::size;
  const int first = ahead(student);
  const int64_t head = ahead(teacher) != first || first > columns ? columns : first;
  for (int64_t i = threadIdx.x; i < head; i += kThreads<E>) action(i, to_compute(student[i]), to_compute(teacher[i]));
  const int64_t packs = (columns - head) / kPack;
  const auto* s = reinterpret_cast<const Pack<E>*>(student + head);
  const auto* t = reinterpret_cast<const Pack<E>*>(teacher + head);
  for (int64_t k = threadIdx.x; k < packs; k += kThreads<E>) {
    const Pack<E> ps = s[k], pt = t[k];
#pragma unroll
    for (int j = 0; j < kPack; ++j) action(head + k * kPack + j, to_compute(ps.element[j]), to_compute(pt.element[j]));
  }
  for (int64_t i = head + packs * kPack + threadIdx.x; i < columns; i += kThreads<E>)
    action(i, to_compute(student[i]), to_compute(teacher[i]));
}

template <class T, class Combine>
__device__ T block_reduce(T x, Combine&& combine) {
  __shared__ T parts[kMostThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
  __syncthreads();  // the parts of an earlier reduction have been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  T result = parts[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) result = combine(result, parts[w]);
  return result;
}

template <class T>
__device__ T block_sum(T x) {
  return block_reduce(x, [](T a, T b) { return a + b; });
}

// The whole block's part, for every thread.
template <class T>
__device__ Part<T> merge_block(Part<T> own, const Tempering<T>& row) {
  return merge(own, row, [](auto x, auto combine) { return block_reduce(x, combine); });
}

// The student's own maximum and ln of sum(exp(a - maximum)): where a column lies too far from the teacher's.
template <class E>
__device__ void own_softmax(const E* student, const E* teacher, int64_t columns, const Tempering<Compute<E>>& tempering,
                            RowStats<Compute<E>>& stats) {
  using T = Compute<E>;
  OwnSum<T> own;
  for_columns(student, teacher, columns, [&](int64_t, T s, T) { own.add(s, tempering.inv_student); });
  const Part<T> all = merge_block(own.part(), tempering);
  stats.own_max = all.own, stats.own_log = static_cast<T>(::log(all.difference));
}

template <class E>
__device__ Part<Compute<E>> masses_of(const E* student, const E* teacher, int64_t columns,
                                      const Tempering<Compute<E>>& tempering, const Part<Compute<E>>& from) {
  using T = Compute<E>;
  Masses<T, T> masses = masses_from(from, tempering);
  Part<T> own = no_part<T>();
  for_columns(student, teacher, columns, [&](int64_t, T s, T t) {
    const Scores<T> c = scores(s, t, tempering);
    masses.raise(c, tempering);
    const Mass<T> share = mass<false>(c, masses.unit(), tempering.inv_student, tempering.inv_teacher);
    masses.sum += share.sum;
    masses.difference += share.difference;
    if (!(math::magnitude(c.d) <= T(kNear))) own.far = T(1);
    if (s > own.top_student) own.top_student = s, own.top_teacher = t;
  });
  take(own, masses);
  return merge_block(own, tempering);
}

template <bool kTop, class E>
__device__ RowStats<Compute<E>> statistics(const E* student, const E* teacher, int64_t columns,
                                           Tempering<Compute<E>>& tempering, bool part) {
  using T = Compute<E>;
  guess_row_shift(tempering, student, teacher, columns);
  const auto read = [&](const Part<T>& from) { return masses_of(student, teacher, columns, tempering, from); };
  const auto common = [&] {
    Common<T> own;
    for_columns(student, teacher, columns, [&](int64_t, T s, T t) { own.add(scores(s, t, tempering)); });
    return merge_block(own.part(), tempering);
  };
  const Part<T> all = read_row(tempering, read, common);
  RowStats<T> stats{};
  stats.max = all.max > T(-INFINITY) || part ? all.max : T(NAN);
  stats.inv_sum = static_cast<T>(1.0 / all.sum), stats.reference = all.reference;
  if (kTop) stats.top_student = all.top_student, stats.top_teacher = all.top_teacher;
  const bool exact = exact_log_ratio(all.difference / all.sum, stats.log_ratio);
  if (all.far == T(0) && exact && near_row(stats))
    own_from_teacher(stats, all.own, all.sum);
  else
    own_softmax(student, teacher, columns, tempering, stats);
  return stats;
}

template <class Rule, class E>
__global__ void __launch_bounds__(kThreads<E>, 1)
    logit_kernel(LogitArgs args, Tempering<Compute<E>> tempered, Mixture<Compute<E>> mixture) {
  using T = Compute<E>;
  for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x) {
    const E* student = static_cast<const E*>(args.student) + r * args.student_stride;
    const E* teacher = static_cast<const E*>(args.teacher) + r * args.teacher_stride;
    E* gradient = args.gradient ? static_cast<E*>(args.gradient) + r * args.gradient_stride : nullptr;
    T* saved = static_cast<T*>(args.stats) + r * kStats;
    const T scale = static_cast<const T*>(args.row_scale)[r];
    const T dloss = args.dloss ? static_cast<const T*>(args.dloss)[r] : T(1);
    if (args.keep_unit && dloss == T(1)) continue;
    if (scale == T(0)) {
      if (gradient)
        for (int64_t i = threadIdx.x; i < args.columns; i += kThreads<E>) from_compute(T(0), gradient[i]);
      if (args.loss && threadIdx.x == 0) static_cast<T*>(args.loss)[r] = T(0);
      if (args.loss && threadIdx.x < kStats) saved[threadIdx.x] = T(0);
      continue;
    }
    Tempering<T> tempering = tempered;
    RowStats<T> stats{};
    stats.inv_sum = static_cast<T>(1.0 / args.columns);
    if (!args.loss || args.phase == Phase::value) {
      stats = {saved[kMax],    saved[kInvSum], saved[kLogRatio],   saved[kCentre],    saved[kReference],
               saved[kOwnMax], saved[kOwnLog], saved[kTopStudent], saved[kTopTeacher]};
      tempering.shift_to(saved[kShift], saved[kShiftTeacher]);
    } else if (Rule::softmax) {
      stats = statistics<Rule::centred>(student, teacher, args.columns, tempering, args.phase == Phase::statistics);
    }
    const T factor = static_cast<T>(scale * dloss * args.value_factor / args.student_temperature);
    RowTerms<T> row = row_terms<Rule>(stats, tempering, mixture);
    const bool shares = args.loss && args.phase != Phase::statistics;
    T value = 0, centre = 0;
    if (shares) {
      for_columns(student, teacher, args.columns, [&](int64_t i, T s, T t) {
        const Result<T> part = result<Rule, false>(scores(s, t, tempering), row);
        value += part.value;
        centre += part.centre;
        if (!Rule::centred && gradient) from_compute(factor * part.gradient, gradient[i]);
      });
      value = static_cast<T>(block_sum(static_cast<double>(value)));
      if (Rule::centred) row.stats.centre = stats.centre = static_cast<T>(block_sum(static_cast<double>(centre)));
    }
    if (args.loss) {
      __syncthreads();  // every thread has read what was given
      if (threadIdx.x == 0) {
        static_cast<T*>(args.loss)[r] = static_cast<T>(value * args.value_factor * scale);
        save(saved, stats, tempering);
      }
    }
    // Where the vocabulary is split, a centred rule's gradient waits for the whole centre.
    if (gradient && (!args.loss || (Rule::centred && args.phase == Phase::all)))
      for_columns(student, teacher, args.columns, [&](int64_t i, T s, T t) {
        from_compute(factor * result<Rule, false>(scores(s, t, tempering), row).gradient, gradient[i]);
      });
  }
}

template <class Rule, class E>
void launch(const LogitArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  const int blocks = static_cast<int>(args.rows < (1 << 30) ? args.rows : (1 << 30));
  const auto tempering = tempering_of<Compute<E>>(args.student_temperature, args.teacher_temperature);
  const auto mixture = mixture_of<Compute<E>>(args.beta);
  logit_kernel<Rule, E><<<blocks, kThreads<E>, 0, stream>>>(args, tempering, mixture);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("logit: launch failed: ") + cudaGetErrorString(error));
}

std::atomic<int> cluster_blocks{cuda::kChooseCluster};

}  // namespace

void cuda::use_cluster(int blocks) { cluster_blocks = blocks; }

void cuda::logit(const LogitArgs& args, void* stream) {
  if (logit_cluster(args, cluster_blocks, stream)) return;
  with_rule(static_cast<Divergence>(args.divergence), [&](auto rule) {
    using Rule = decltype(rule);
    const auto s = static_cast<cudaStream_t>(stream);
    switch (args.dtype) {
      case DType::f32:
        return launch<Rule, float>(args, s);
      case DType::bf16:
        return launch<Rule, __nv_bfloat16>(args, s);
      case DType::f16:
        return launch<Rule, __half>(args, s);
      case DType::f64:
        return launch<Rule, double>(args, s);
    }
  });
}

}  // namespace fastdistil
