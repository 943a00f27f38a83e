// logit_loss of the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include <pybind11/stl.h>

#include "../cpu/dispatch.h"
#include "bindings.h"
#include "tensor_view.h"
#if defined(FD_CUDA)
#include "../../kernels/cuda/launch.h"
#endif

namespace py = pybind11;

namespace fastdistil {
namespace {

// The rule and its constants, the same for every call of the stem.
struct Rule {
  int divergence;
  double beta, student_temperature, teacher_temperature, value_factor;
  bool difference;
};

LogitArgs logit_args(const TensorView& student, const TensorView& teacher, const TensorView& row_scale,
                     const TensorView& stats, const OptionalView& gradient, const Rule& rule, bool cpu) {
  const DType dtype = student.expect_matrix("student").floating_dtype("student"), accumulator = accumulator_of(dtype);
  const int64_t rows = student.size(0), columns = student.size(1);
  student.expect_rows("student", rows, columns, dtype).expect_device("student", cpu);
  teacher.expect_rows("teacher", rows, columns, dtype).expect_device("teacher", cpu);
  row_scale.expect_vector("row_scale", rows, accumulator).expect_device("row_scale", cpu);
  stats.expect_rows("stats", rows, kStats, accumulator).expect_device("stats", cpu);
  if (stats.stride(0) != kStats && rows > 1) throw std::invalid_argument("stats is not contiguous");
  if (gradient) gradient->expect_rows("gradient", rows, columns, dtype).expect_device("gradient", cpu);
  if (rule.divergence < 0 || rule.divergence >= kDivergenceCount)
    throw std::invalid_argument("divergence " + std::to_string(rule.divergence) + " does not exist");
  if (rule.difference && (!cpu || rule.student_temperature != rule.teacher_temperature))
    throw std::invalid_argument(cpu ? "difference: the temperatures differ" : "difference: CPU kernels alone take it");
  LogitArgs args{};
  args.student = student.data, args.teacher = teacher.data, args.row_scale = row_scale.data, args.stats = stats.data;
  args.rows = rows, args.columns = columns, args.dtype = dtype;
  args.student_stride = student.stride(0), args.teacher_stride = teacher.stride(0);
  if (gradient) args.gradient = gradient->data, args.gradient_stride = gradient->stride(0);
  args.difference = rule.difference;
  args.divergence = rule.divergence, args.beta = rule.beta, args.value_factor = rule.value_factor;
  args.student_temperature = rule.student_temperature, args.teacher_temperature = rule.teacher_temperature;
  return args;
}

using Run = void (*)(const LogitArgs&, const LabelArgs&, uintptr_t where);

// `where`: the number of threads on the CPU, the stream on a GPU.
template <Run run, bool cpu>
void logit_fwd(const TensorView& student, const TensorView& teacher, const TensorView& row_scale,
               const TensorView& loss, const TensorView& stats, const OptionalView& gradient, int divergence,
               double beta, double student_temperature, double teacher_temperature, double value_factor,
               uintptr_t where, int phase, const OptionalView& labels, const OptionalView& label_scale,
               bool difference) {
  if (phase < 0 || phase >= kPhaseCount)
    throw std::invalid_argument("phase " + std::to_string(phase) + " does not exist");
  const Rule rule{divergence, beta, student_temperature, teacher_temperature, value_factor, difference};
  LogitArgs args = logit_args(student, teacher, row_scale, stats, gradient, rule, cpu);
  args.phase = static_cast<Phase>(phase);
  loss.expect_vector("loss", args.rows, row_scale.element).expect_device("loss", cpu);
  args.loss = loss.data;
  if (labels && (!label_scale || !cpu || phase)) throw std::invalid_argument("labels: no factor, a GPU or a phase");
  if (labels) labels->expect_vector("labels", args.rows, Element::i64).expect_device("labels", cpu);
  if (label_scale)
    label_scale->expect_vector("label_scale", args.rows, row_scale.element).expect_device("label_scale", cpu);
  const LabelArgs added{labels ? labels->data : nullptr, label_scale ? label_scale->data : nullptr};
  py::gil_scoped_release release;
  run(args, added, where);
}

template <Run run, bool cpu>
void logit_bwd(const TensorView& student, const TensorView& teacher, const TensorView& row_scale,
               const TensorView& stats, const TensorView& gradient, const TensorView& dloss, bool keep_unit,
               int divergence, double beta, double student_temperature, double teacher_temperature, double value_factor,
               uintptr_t where, bool difference) {
  const Rule rule{divergence, beta, student_temperature, teacher_temperature, value_factor, difference};
  LogitArgs args = logit_args(student, teacher, row_scale, stats, gradient, rule, cpu);
  dloss.expect_vector("dloss", args.rows, row_scale.element).expect_device("dloss", cpu);
  args.dloss = dloss.data, args.keep_unit = keep_unit;
  py::gil_scoped_release release;
  run(args, {}, where);
}

void logit_cpu(const LogitArgs& args, const LabelArgs& labels, uintptr_t threads) {
  cpu::logit(args, labels, threads < 1 ? 1 : static_cast<int>(threads));
}

#if defined(FD_CUDA)
void logit_cuda(const LogitArgs& args, const LabelArgs&, uintptr_t stream) {
  cuda::logit(args, reinterpret_cast<void*>(stream));
}

void use_cuda_cluster(int blocks) {
  if (blocks < -1 || blocks > 16)
    throw std::invalid_argument("use_cuda_cluster: blocks is " + std::to_string(blocks) + ", expected -1 to 16");
  cuda::use_cluster(blocks);
}
#endif

template <Run run, bool cpu>
void define(py::module_& m, const char* forward, const char* backward, const char* where) {
  m.def(forward, &logit_fwd<run, cpu>, py::arg("student"), py::arg("teacher"), py::arg("row_scale"), py::arg("loss"),
        py::arg("stats"), py::arg("gradient"), py::arg("divergence"), py::arg("beta"), py::arg("student_temperature"),
        py::arg("teacher_temperature"), py::arg("value_factor"), py::arg(where), py::arg("phase") = 0,
        py::arg("labels") = py::none(), py::arg("label_scale") = py::none(), py::arg("difference") = false);
  m.def(backward, &logit_bwd<run, cpu>, py::arg("student"), py::arg("teacher"), py::arg("row_scale"), py::arg("stats"),
        py::arg("gradient"), py::arg("dloss"), py::arg("keep_unit"), py::arg("divergence"), py::arg("beta"),
        py::arg("student_temperature"), py::arg("teacher_temperature"), py::arg("value_factor"), py::arg(where),
        py::arg("difference") = false);
}

}  // namespace

void define_logit(py::module_& m) {
  define<logit_cpu, true>(m, "logit_fwd", "logit_bwd", "threads");
#if defined(FD_CUDA)
  define<logit_cuda, false>(m, "logit_fwd_cuda", "logit_bwd_cuda", "stream");
  m.def(
      "use_cuda_cluster", &use_cuda_cluster, py::arg("blocks"),
      "blocks of the cluster that holds a row of logits on sm_90, for tests and benchmarks: 1 to 16, 0 for the kernel "
      "that reads each logit twice, -1 for what fits the row");
#endif
}

}  // namespace fastdistil
