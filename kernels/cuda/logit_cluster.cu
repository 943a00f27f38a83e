// Divergence of two rows of logits on sm_90: a cluster of blocks holds both rows in shared memory, each logit is read
// once from device memory and the gradient is written once.
//
// Floor: (2 reads + 1 write) x N x V x bytes an element over the copy bandwidth: at V 128,000 in bf16 0.77 MB a row,
// at 250,002 1.5 MB. Clusters stay on the chip and go from row to row. A chunk of shared memory is refilled with the
// next row as soon as the last pass over it is done, so that up to the whole of both next rows is in flight while the
// current one's gradient is computed and written.
//
// sm_90a: 84 to 100 registers (bf16), no spills, 3,136 bytes of shared memory beside the chunks. Not yet run on a GPU;
// docs/cuda.md counts instructions and bytes in flight.
#include <stdexcept>
#include <string>

#include "cluster_chunks.h"
#include "launch.h"

namespace fastdistil {
namespace {

template <class Rule, class E>
class Worker {
  const LogitArgs& args_;
  const Tempering<float>& tempered_;
  const Mixture<float>& mixture_;
  Board<E>& board_;
  Chunks<E> chunks_;
  int exchanges_ = 0;
  Tempering<float> tempering_;
  bool near_ = false;
  float centre_ = 0;

  __device__ Part<float> merge_lanes(Part<float> own) const {
    return merge(own, tempered_, [](auto x, auto combine) { return combine_lanes(x, combine); });
  }

  // The whole cluster's part, for every thread. Callers come together, all threads of all blocks.
  __device__ Part<float> exchange(Part<float> own) {
    const int turn = exchanges_++ & 1, lane = threadIdx.x % 32;
    own = merge_lanes(own);
    if (lane == 0) board_.warps[turn][threadIdx.x / 32] = own;
    __syncthreads();
    const int blocks = static_cast<int>(hopper::cluster_size());
    if (threadIdx.x < 32) {
      own = merge_lanes(lane < kWarps ? board_.warps[turn][lane] : no_part<float>());
      if (lane < blocks) *hopper::peer(&board_.blocks[turn][hopper::cluster_rank()], lane) = own;
    }
    hopper::cluster_sync();
    return merge_lanes(lane < blocks ? board_.blocks[turn][lane] : no_part<float>());
  }

  __device__ void own_softmax(const Row<E>& row, RowStats<float>& stats) {
    OwnSum<float> own;
    chunks_.template for_columns<false, false>(row, nullptr, tempering_, [&](const auto& found, bool, E*) {
      for (const Scores<float>& c : found) own.add(c.a, tempering_.inv_student);
    });
    const Part<float> all = exchange(own.part());
    stats.own_max = all.own, stats.own_log = static_cast<float>(::log(all.difference));
  }

  template <bool kWait>
  __device__ Part<float> masses_of(const Row<E>& row, const Part<float>& from) {
    Masses<float, float> masses = masses_from(from, tempering_);
    Part<float> own = no_part<float>();
    chunks_.template for_columns<kWait, false>(row, nullptr, tempering_, [&](const auto& found, bool near, E*) {
      Scores<float> largest = found[0];
#pragma unroll
      for (const Scores<float>& c : found) {
        if (c.b > largest.b) largest = c;
        if (Rule::centred && c.a > own.top_student) own.top_student = c.a, own.top_teacher = c.b;
      }
      masses.raise(largest, tempering_);
      const bool short_form = near && math::magnitude(masses.reference) <= float(kNear);
      short_form ? add<true>(found, masses) : add<false>(found, masses);
      if (!near) own.far = 1.0f;
    });
    take(own, masses);
    return exchange(own);
  }

  __device__ void statistics(const Row<E>& row, int64_t r) {
    bool first = true;
    const auto read = [&](const Part<float>& from) {
      if (!first) return masses_of<false>(row, from);
      first = false;
      return masses_of<true>(row, from);
    };
    const auto common = [&] {
      Common<float> own;
      chunks_.template for_columns<false, false>(row, nullptr, tempering_, [&](const auto& found, bool, E*) {
        for (const Scores<float>& c : found) own.add(c);
      });
      return exchange(own.part());
    };
    Part<float> all = read_row(tempering_, read, common);
    if (!Rule::centred) all.top_student = all.top_teacher = 0;
    RowStats<float> stats{};
    stats.max = all.max > -INFINITY ? all.max : NAN, stats.inv_sum = static_cast<float>(1.0 / all.sum);
    stats.reference = all.reference, stats.top_student = all.top_student, stats.top_teacher = all.top_teacher;
    const bool exact = exact_log_ratio(all.difference / all.sum, stats.log_ratio);
    near_ = near_row(stats), centre_ = 0;
    if (all.far == 0 && exact && near_)
      own_from_teacher(stats, all.own, all.sum);
    else
      own_softmax(row, stats);
    // Registers are short where the passes are long; every thread is behind the last row's use of these.
    if (threadIdx.x == 0) {
      board_.terms = row_terms<Rule>(stats, tempering_, mixture_);
      if (hopper::cluster_rank() == 0) save(static_cast<float*>(args_.stats) + r * kStats, stats, tempering_);
    }
    __syncthreads();
  }

  template <bool kNearGroup, class Found>
  __device__ void add(const Found& found, Masses<float, float>& masses) const {
#pragma unroll
    for (const Scores<float>& c : found) {
      const Mass<float> share = mass<kNearGroup>(c, masses.unit(), tempered_.inv_student, tempered_.inv_teacher);
      masses.sum += share.sum;
      masses.difference += share.difference;
    }
  }

  struct Totals {
    float value = 0, centre = 0;
  };

  // Value and centre, and where kWrite the gradient.
  template <bool kWrite>
  __device__ Totals finish(const Row<E>& row, const Row<E>* next, float factor) {
    Totals totals;
    chunks_.template for_columns<false, kWrite>(row, next, tempering_, [&](const auto& found, bool near, E* out) {
      near&& near_ ? columns<kWrite, true>(found, factor, totals, out)
                   : columns<kWrite, false>(found, factor, totals, out);
    });
    return totals;
  }

  template <bool kWrite, bool kNearGroup, int kColumns>
  __device__ void columns(const Scores<float> (&found)[kColumns], float factor, Totals& totals, E* out) const {
    RowTerms<float> row = board_.terms;
    row.stats.centre = centre_;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const Result<float> share = result<Rule, kNearGroup>(found[j], row);
      totals.value += share.value;
      totals.centre += share.centre;
      if (kWrite) from_compute(factor * share.gradient, out[j]);
    }
  }

  __device__ __forceinline__ void work(const Row<E>& row, int64_t r, const Row<E>* next) {
    const float scale = static_cast<const float*>(args_.row_scale)[r];
    const float factor = static_cast<float>(scale * args_.value_factor / args_.student_temperature);
    tempering_ = tempered_;
    tempering_.equal = true;
    guess_row_shift(tempering_, row.student, row.teacher, args_.columns);
    statistics(row, r);
    // Behind statistics' barriers nobody reads the student's row any more: its memory may be the gradient's.
    const bool write = row.gradient != nullptr;
    Totals own;
    if (Rule::centred || !write)
      own = finish<false>(row, write ? nullptr : next, 0);
    else
      own = finish<true>(row, next, factor);
    const Part<float> all = exchange({0, 0, 0, 0, 0, 0, 0, own.value, own.centre, 0});
    centre_ = static_cast<float>(all.difference);
    if (Rule::centred && write) finish<true>(row, next, factor);
    if (hopper::cluster_rank() != 0 || threadIdx.x != 0) return;
    static_cast<float*>(args_.loss)[r] = static_cast<float>(all.sum * args_.value_factor * scale);
    static_cast<float*>(args_.stats)[r * kStats + kCentre] = centre_;
  }

  __device__ void skip(int64_t r) const {
    E* gradient = args_.gradient ? static_cast<E*>(args_.gradient) + r * args_.gradient_stride : nullptr;
    const int64_t begin = hopper::cluster_rank() * kThreads + threadIdx.x, step = hopper::cluster_size() * kThreads;
    if (gradient)
      for (int64_t i = begin; i < args_.columns; i += step) from_compute(0.0f, gradient[i]);
    if (begin == 0) static_cast<float*>(args_.loss)[r] = 0;
    if (begin < kStats) static_cast<float*>(args_.stats)[r * kStats + begin] = 0;
  }

  // This cluster's next row that counts; those on the way are done here.
  __device__ int64_t row_after(int64_t r) const {
    const int64_t clusters = gridDim.x / hopper::cluster_size();
    for (r += clusters; r < args_.rows; r += clusters) {
      if (static_cast<const float*>(args_.row_scale)[r] != 0) return r;
      skip(r);
    }
    return args_.rows;
  }

 public:
  __device__ Worker(const LogitArgs& args, const Tempering<float>& tempered, const Mixture<float>& mixture,
                    Board<E>& board, unsigned char* memory)
      : args_(args), tempered_(tempered), mixture_(mixture), board_(board), chunks_(args.columns, board.full, memory) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0)
      for (int c = 0; c < kMostChunks; ++c) hopper::init(board_.full + c);
    hopper::cluster_sync();  // also: every block of the cluster runs before its memory is written to
    const int64_t clusters = gridDim.x / hopper::cluster_size();
    int64_t r = row_after(blockIdx.x / hopper::cluster_size() - clusters);
    if (r >= args_.rows) return;
    if (threadIdx.x == 0) {
      board_.rows[0] = Row<E>(args_, r);
      for (int c = 0; c < board_.rows[0].chunks(); ++c) chunks_.fill(board_.rows[0], c);
    }
    __syncthreads();
    for (int turn = 0; r < args_.rows; turn = (turn + 1) % 3) {
      const int64_t after = row_after(r);
      Row<E>* next = after < args_.rows ? board_.rows + (turn + 1) % 3 : nullptr;
      if (next && threadIdx.x == 0) *next = Row<E>(args_, after);  // seen behind the barriers of the row's statistics
      work(board_.rows[turn], r, next);
      r = after;
    }
  }
};

template <class Rule, class E>
__global__ void __launch_bounds__(kThreads, 2)
    logit_cluster_kernel(LogitArgs args, Tempering<float> tempering, Mixture<float> mixture) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ Board<E> board;
  extern __shared__ unsigned char memory[];
  Worker<Rule, E>(args, tempering, mixture, board, memory).run();
#endif
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("logit: launch failed: ") + cudaGetErrorString(error));
}

template <class Rule, class E>
bool launch(const LogitArgs& args, Plan plan, cudaStream_t stream) {
  const auto kernel = logit_cluster_kernel<Rule, E>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes()));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks)), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.bytes()), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  int active = 0;
  if (cudaOccupancyMaxActiveClusters(&active, kernel, &config) != cudaSuccess || active < 1) {
    cudaGetLastError();  // 16 blocks are more than every GPU has to offer: two reads, then
    return false;
  }
  const int64_t clusters = args.rows < active ? args.rows : active;
  config.gridDim = dim3(static_cast<unsigned>(clusters * plan.blocks));
  const auto tempering = tempering_of<float>(args.student_temperature, args.teacher_temperature);
  check(cudaLaunchKernelEx(&config, kernel, args, tempering, mixture_of<float>(args.beta)));
  return true;
}

bool has_clusters() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major == 9;  // sm_90a code runs there alone
}

}  // namespace

bool cuda::logit_cluster(const LogitArgs& args, int blocks, void* stream) {
  // The backward and a part of a vocabulary read each logit once or not at all to begin with; so does mse.
  // Differences of two temperatures are float64, for which there are no registers here.
  const bool whole = args.loss && args.phase == Phase::all && args.student_temperature == args.teacher_temperature;
  if (args.rows == 0 || !whole || args.dtype == DType::f64 || blocks == kTwoReads || !has_clusters()) return false;
  const int itemsize = args.dtype == DType::f32 ? 4 : 2;
  const Plan plan = blocks > 0 ? plan_of(args.columns, itemsize, blocks) : cluster_plan(args.columns, itemsize);
  if (plan.blocks == 0 || plan.bytes() > kBlockBytes) return false;
  bool done = false;
  with_rule(static_cast<Divergence>(args.divergence), [&](auto rule) {
    using Rule = decltype(rule);
    const auto s = static_cast<cudaStream_t>(stream);
    if constexpr (Rule::softmax) {
      if (args.dtype == DType::f32) done = launch<Rule, float>(args, plan, s);
      if (args.dtype == DType::bf16) done = launch<Rule, __nv_bfloat16>(args, plan, s);
      if (args.dtype == DType::f16) done = launch<Rule, __half>(args, plan, s);
    }
  });
  return done;
}

}  // namespace fastdistil
