// Everything that Python can call: the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/dispatch.h"
#include "tensor_view.h"
#if defined(FD_CUDA)
#include "../kernels/cuda/launch.h"
#endif

namespace py = pybind11;
using fastdistil::DType;
using fastdistil::LogitArgs;
using fastdistil::TensorView;

namespace {

using Optional = std::optional<TensorView>;

// loss given: forward, which writes loss, stats and (where given) gradient. loss None: backward, which reads stats.
LogitArgs logit_args(const TensorView& student, const TensorView& teacher, const TensorView& row_scale,
                     const Optional& loss, const TensorView& stats, const Optional& gradient, int divergence,
                     double beta, double student_temperature, double teacher_temperature, double value_factor,
                     bool cpu) {
  if (student.shape.size() != 2) throw std::invalid_argument("student is not a matrix");
  const int64_t rows = student.size(0), columns = student.size(1);
  const DType accumulator = student.dtype == DType::f64 ? DType::f64 : DType::f32;
  student.expect_rows("student", rows, columns, student.dtype).expect_device("student", cpu);
  teacher.expect_rows("teacher", rows, columns, student.dtype).expect_device("teacher", cpu);
  row_scale.expect_vector("row_scale", rows, accumulator).expect_device("row_scale", cpu);
  stats.expect_rows("stats", rows, fastdistil::kStats, accumulator).expect_device("stats", cpu);
  if (stats.stride(0) != fastdistil::kStats && rows > 1) throw std::invalid_argument("stats is not contiguous");
  if (loss) loss->expect_vector("loss", rows, accumulator).expect_device("loss", cpu);
  if (gradient) gradient->expect_rows("gradient", rows, columns, student.dtype).expect_device("gradient", cpu);
  if (!loss && !gradient) throw std::invalid_argument("neither loss nor gradient was given: nothing to compute");
  if (divergence < 0 || divergence > static_cast<int>(fastdistil::kDivergences) - 1)
    throw std::invalid_argument("divergence " + std::to_string(divergence) + " does not exist");
  return {student.data, teacher.data, row_scale.data, loss ? loss->data : nullptr, stats.data,
          gradient ? gradient->data : nullptr, rows, columns, student.stride(0), teacher.stride(0),
          gradient ? gradient->stride(0) : 0, student.dtype, divergence, beta, student_temperature,
          teacher_temperature, value_factor};
}

void logit(const TensorView& student, const TensorView& teacher, const TensorView& row_scale, const Optional& loss,
           const TensorView& stats, const Optional& gradient, int divergence, double beta, double student_temperature,
           double teacher_temperature, double value_factor, int threads) {
  const LogitArgs args = logit_args(student, teacher, row_scale, loss, stats, gradient, divergence, beta,
                                    student_temperature, teacher_temperature, value_factor, true);
  if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 1 or more");
  py::gil_scoped_release release;
  fastdistil::cpu::logit(args, threads);
}

#if defined(FD_CUDA)
void logit_cuda(const TensorView& student, const TensorView& teacher, const TensorView& row_scale,
                const Optional& loss, const TensorView& stats, const Optional& gradient, int divergence, double beta,
                double student_temperature, double teacher_temperature, double value_factor, uintptr_t stream) {
  const LogitArgs args = logit_args(student, teacher, row_scale, loss, stats, gradient, divergence, beta,
                                    student_temperature, teacher_temperature, value_factor, false);
  py::gil_scoped_release release;
  fastdistil::cuda::logit(args, reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastdistil's compiled kernels";
  m.def("isa", &fastdistil::cpu::isa, "the instruction set that the CPU kernels use here");
  m.def("logit", &logit, py::arg("student"), py::arg("teacher"), py::arg("row_scale"), py::arg("loss"),
        py::arg("stats"), py::arg("gradient"), py::arg("divergence"), py::arg("beta"), py::arg("student_temperature"),
        py::arg("teacher_temperature"), py::arg("value_factor"), py::arg("threads"));
#if defined(FD_CUDA)
  m.def("logit_cuda", &logit_cuda, py::arg("student"), py::arg("teacher"), py::arg("row_scale"), py::arg("loss"),
        py::arg("stats"), py::arg("gradient"), py::arg("divergence"), py::arg("beta"), py::arg("student_temperature"),
        py::arg("teacher_temperature"), py::arg("value_factor"), py::arg("stream"));
  m.attr("cuda_arches") = FD_CUDA;
#else
  m.attr("cuda_arches") = "";
#endif
}
