// What comes on top of a divergence of logits, as Python calls it: cross entropy and the moments of rows.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace py = pybind11;

using fastdistil::CrossEntropyArgs;
using fastdistil::DType;
using fastdistil::RowMomentsArgs;
using fastdistil::TensorView;

namespace {

using Optional = std::optional<TensorView>;

// `labels` is the address of int64 entries: TensorView knows floating dtypes alone.
void cross_entropy_rows(const TensorView& logits, uintptr_t labels, const TensorView& row_scale, const TensorView& loss,
                        const Optional& gradient, const Optional& whole, int threads) {
  if (logits.shape.size() != 2 || (logits.dtype != DType::f32 && logits.dtype != DType::f64))
    throw std::invalid_argument("logits is not a float32 or float64 matrix");
  const int64_t rows = logits.size(0), columns = logits.size(1);
  logits.expect_rows("logits", rows, columns, logits.dtype).expect_device("logits", true);
  row_scale.expect_vector("row_scale", rows, logits.dtype).expect_device("row_scale", true);
  loss.expect_vector("loss", rows, logits.dtype).expect_device("loss", true);
  if (gradient) gradient->expect_rows("gradient", rows, columns, logits.dtype).expect_device("gradient", true);
  if (whole) whole->expect_rows("whole", rows, 2, logits.dtype).expect_device("whole", true);
  if (whole && whole->stride(0) != 2 && rows > 1) throw std::invalid_argument("whole is not contiguous");
  CrossEntropyArgs args{};
  args.logits = logits.data, args.labels = reinterpret_cast<const void*>(labels), args.row_scale = row_scale.data;
  args.loss = loss.data, args.rows = rows, args.columns = columns, args.dtype = logits.dtype;
  args.logits_stride = logits.stride(0), args.whole = whole ? whole->data : nullptr;
  if (gradient) args.gradient = gradient->data, args.gradient_stride = gradient->stride(0);
  py::gil_scoped_release release;
  fastdistil::cpu::cross_entropy(args, threads < 1 ? 1 : threads);
}

void row_moments(const TensorView& student, const TensorView& teacher, const TensorView& row_scale,
                 const TensorView& moments, double student_temperature, double teacher_temperature, int threads) {
  if (student.shape.size() != 2) throw std::invalid_argument("student is not a matrix");
  const int64_t rows = student.size(0), columns = student.size(1);
  const DType accumulator = student.dtype == DType::f64 ? DType::f64 : DType::f32;
  student.expect_rows("student", rows, columns, student.dtype).expect_device("student", true);
  teacher.expect_rows("teacher", rows, columns, student.dtype).expect_device("teacher", true);
  row_scale.expect_vector("row_scale", rows, accumulator).expect_device("row_scale", true);
  moments.expect_rows("moments", rows, fastdistil::kMoments, accumulator).expect_device("moments", true);
  if (moments.stride(0) != fastdistil::kMoments && rows > 1) throw std::invalid_argument("moments is not contiguous");
  RowMomentsArgs args{};
  args.student = student.data, args.teacher = teacher.data, args.row_scale = row_scale.data;
  args.moments = moments.data, args.rows = rows, args.columns = columns, args.dtype = student.dtype;
  args.student_stride = student.stride(0), args.teacher_stride = teacher.stride(0);
  args.student_temperature = student_temperature, args.teacher_temperature = teacher_temperature;
  py::gil_scoped_release release;
  fastdistil::cpu::row_moments(args, threads < 1 ? 1 : threads);
}

}  // namespace

void fastdistil::define_terms(py::module_& m) {
  m.def("cross_entropy_rows", &cross_entropy_rows, py::arg("logits"), py::arg("labels"), py::arg("row_scale"),
        py::arg("loss"), py::arg("gradient"), py::arg("whole"), py::arg("threads"));
  m.def("row_moments", &row_moments, py::arg("student"), py::arg("teacher"), py::arg("row_scale"), py::arg("moments"),
        py::arg("student_temperature"), py::arg("teacher_temperature"), py::arg("threads"));
}
