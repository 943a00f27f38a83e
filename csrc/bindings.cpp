// Everything that Python can call: the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/pool.h"
#include "tensor_view.h"
#if defined(FD_CUDA)
#include "../kernels/cuda/launch.h"
#endif

namespace py = pybind11;

using fastdistil::DType;
using fastdistil::HiddenArgs;
using fastdistil::LogitArgs;
using fastdistil::TensorView;
using fastdistil::cpu::PooledMemory;

namespace {

using Optional = std::optional<TensorView>;

// The rule and its constants, the same for every call of the stem.
struct Rule {
  int divergence;
  double beta, student_temperature, teacher_temperature, value_factor;
  bool difference;
};

LogitArgs logit_args(const TensorView& student, const TensorView& teacher, const TensorView& row_scale,
                     const TensorView& stats, const Optional& gradient, const Rule& rule, bool cpu) {
  if (student.shape.size() != 2) throw std::invalid_argument("student is not a matrix");
  const int64_t rows = student.size(0), columns = student.size(1);
  const DType accumulator = student.dtype == DType::f64 ? DType::f64 : DType::f32;
  student.expect_rows("student", rows, columns, student.dtype).expect_device("student", cpu);
  teacher.expect_rows("teacher", rows, columns, student.dtype).expect_device("teacher", cpu);
  row_scale.expect_vector("row_scale", rows, accumulator).expect_device("row_scale", cpu);
  stats.expect_rows("stats", rows, fastdistil::kStats, accumulator).expect_device("stats", cpu);
  if (stats.stride(0) != fastdistil::kStats && rows > 1) throw std::invalid_argument("stats is not contiguous");
  if (gradient) gradient->expect_rows("gradient", rows, columns, student.dtype).expect_device("gradient", cpu);
  if (rule.divergence < 0 || rule.divergence >= fastdistil::kDivergences)
    throw std::invalid_argument("divergence " + std::to_string(rule.divergence) + " does not exist");
  if (rule.difference && (!cpu || rule.student_temperature != rule.teacher_temperature))
    throw std::invalid_argument(cpu ? "difference: the temperatures differ" : "difference: CPU kernels alone take it");
  LogitArgs args{};
  args.student = student.data, args.teacher = teacher.data, args.row_scale = row_scale.data, args.stats = stats.data;
  args.rows = rows, args.columns = columns, args.dtype = student.dtype;
  args.student_stride = student.stride(0), args.teacher_stride = teacher.stride(0);
  if (gradient) args.gradient = gradient->data, args.gradient_stride = gradient->stride(0);
  args.difference = rule.difference;
  args.divergence = rule.divergence, args.beta = rule.beta, args.value_factor = rule.value_factor;
  args.student_temperature = rule.student_temperature, args.teacher_temperature = rule.teacher_temperature;
  return args;
}

using fastdistil::LabelArgs;
using Run = void (*)(const LogitArgs&, const LabelArgs&, uintptr_t where);

// `where`: the number of threads on the CPU, the stream on a GPU.
template <Run run, bool cpu>
void logit_fwd(const TensorView& student, const TensorView& teacher, const TensorView& row_scale,
               const TensorView& loss, const TensorView& stats, const Optional& gradient, int divergence, double beta,
               double student_temperature, double teacher_temperature, double value_factor, uintptr_t where, int phase,
               uintptr_t labels, const Optional& label_scale, bool difference) {
  if (phase < 0 || phase > 2) throw std::invalid_argument("phase " + std::to_string(phase) + " does not exist");
  const Rule rule{divergence, beta, student_temperature, teacher_temperature, value_factor, difference};
  LogitArgs args = logit_args(student, teacher, row_scale, stats, gradient, rule, cpu);
  args.phase = static_cast<fastdistil::Phase>(phase);
  loss.expect_vector("loss", args.rows, row_scale.dtype).expect_device("loss", cpu);
  args.loss = loss.data;
  if (labels && (!label_scale || !cpu || phase)) throw std::invalid_argument("labels: no factor, a GPU or a phase");
  if (label_scale)
    label_scale->expect_vector("label_scale", args.rows, row_scale.dtype).expect_device("label_scale", cpu);
  const LabelArgs added{reinterpret_cast<const void*>(labels), label_scale ? label_scale->data : nullptr};
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
  dloss.expect_vector("dloss", args.rows, row_scale.dtype).expect_device("dloss", cpu);
  args.dloss = dloss.data, args.keep_unit = keep_unit;
  py::gil_scoped_release release;
  run(args, {}, where);
}

void logit_cpu(const LogitArgs& args, const LabelArgs& labels, uintptr_t threads) {
  fastdistil::cpu::logit(args, labels, threads < 1 ? 1 : static_cast<int>(threads));
}

void hidden_rows(const TensorView& student, const TensorView& teacher, const Optional& bias,
                 const TensorView& row_scale, const TensorView& loss, const Optional& gradient, int kind, int threads) {
  if (student.shape.size() != 2) throw std::invalid_argument("student is not a matrix");
  const int64_t rows = student.size(0), columns = student.size(1);
  const DType accumulator = row_scale.dtype;
  if (accumulator != DType::f32 && accumulator != DType::f64) throw std::invalid_argument("row_scale is not a float");
  student.expect_rows("student", rows, columns, student.dtype).expect_device("student", true);
  teacher.expect_rows("teacher", rows, columns, teacher.dtype).expect_device("teacher", true);
  row_scale.expect_vector("row_scale", rows, accumulator).expect_device("row_scale", true);
  loss.expect_vector("loss", rows, accumulator).expect_device("loss", true);
  if (bias) bias->expect_vector("bias", columns, accumulator).expect_device("bias", true);
  if (gradient) {
    gradient->expect_rows("gradient", rows, columns, gradient->dtype).expect_device("gradient", true);
    if (rows > 1 && gradient->stride(0) != columns) throw std::invalid_argument("gradient is not contiguous");
  }
  if (kind < 0 || kind > 1) throw std::invalid_argument("kind " + std::to_string(kind) + " does not exist");
  HiddenArgs args{};
  args.student = student.data, args.teacher = teacher.data, args.row_scale = row_scale.data, args.loss = loss.data;
  args.bias = bias ? bias->data : nullptr;
  args.rows = rows, args.columns = columns;
  args.student_stride = student.stride(0), args.teacher_stride = teacher.stride(0);
  args.student_dtype = student.dtype, args.teacher_dtype = teacher.dtype, args.accumulator = accumulator;
  if (gradient) args.gradient = gradient->data, args.gradient_dtype = gradient->dtype;
  args.kind = static_cast<fastdistil::HiddenKind>(kind);
  py::gil_scoped_release release;
  fastdistil::cpu::hidden(args, threads < 1 ? 1 : threads);
}

#if defined(FD_CUDA)
void logit_cuda(const LogitArgs& args, const LabelArgs&, uintptr_t stream) {
  fastdistil::cuda::logit(args, reinterpret_cast<void*>(stream));
}

void use_cuda_cluster(int blocks) {
  if (blocks < -1 || blocks > 16)
    throw std::invalid_argument("use_cuda_cluster: blocks is " + std::to_string(blocks) + ", expected -1 to 16");
  fastdistil::cuda::use_cluster(blocks);
}
#endif

template <Run run, bool cpu>
void define_logit(py::module_& m, const char* forward, const char* backward, const char* where) {
  m.def(forward, &logit_fwd<run, cpu>, py::arg("student"), py::arg("teacher"), py::arg("row_scale"), py::arg("loss"),
        py::arg("stats"), py::arg("gradient"), py::arg("divergence"), py::arg("beta"), py::arg("student_temperature"),
        py::arg("teacher_temperature"), py::arg("value_factor"), py::arg(where), py::arg("phase") = 0,
        py::arg("labels") = 0, py::arg("label_scale") = py::none(), py::arg("difference") = false);
  m.def(backward, &logit_bwd<run, cpu>, py::arg("student"), py::arg("teacher"), py::arg("row_scale"), py::arg("stats"),
        py::arg("gradient"), py::arg("dloss"), py::arg("keep_unit"), py::arg("divergence"), py::arg("beta"),
        py::arg("student_temperature"), py::arg("teacher_temperature"), py::arg("value_factor"), py::arg(where),
        py::arg("difference") = false);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastdistil's compiled kernels";
  m.def("isa", &fastdistil::cpu::isa, "the instruction set that the CPU kernels use here");
  m.def("isas", &fastdistil::cpu::isas, "the instruction sets that this processor can run, the best first");
  m.def("use_isa", &fastdistil::cpu::use_isa, py::arg("name"), "use another of isas(), for tests and benchmarks");
  py::class_<PooledMemory>(m, "PooledMemory", py::buffer_protocol(), "bytes whose memory the next one uses again")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](PooledMemory& x) {
        return py::buffer_info(x.data(), 1, py::format_descriptor<uint8_t>::format(),
                               static_cast<py::ssize_t>(x.size()));
      });
  m.def("pool_available", &fastdistil::cpu::pool_available, "whether memory is kept on this system");
  m.def("pool_held", &fastdistil::cpu::pool_held, "bytes that are kept and not in use");
  m.def("pool_release", &fastdistil::cpu::pool_release, "gives the kept memory back to the system");
  m.def("hidden_rows", &hidden_rows, py::arg("student"), py::arg("teacher"), py::arg("bias"), py::arg("row_scale"),
        py::arg("loss"), py::arg("gradient"), py::arg("kind"), py::arg("threads"));
  fastdistil::define_terms(m);
  fastdistil::define_topk(m);
  fastdistil::define_attention(m);
  define_logit<logit_cpu, true>(m, "logit_fwd", "logit_bwd", "threads");
  fastdistil::define_sparse(m);
#if defined(FD_CUDA)
  define_logit<logit_cuda, false>(m, "logit_fwd_cuda", "logit_bwd_cuda", "stream");
  m.def(
      "use_cuda_cluster", &use_cuda_cluster, py::arg("blocks"),
      "blocks of the cluster that holds a row of logits on sm_90, for tests and benchmarks: 1 to 16, 0 for the kernel "
      "that reads each logit twice, -1 for what fits the row");
  m.attr("cuda_arches") = FD_CUDA;
#else
  m.attr("cuda_arches") = "";
#endif
}
