// The hidden-state losses as Python calls them: checks and forwards; the mathematics is elsewhere.
#include <pybind11/stl.h>

#include <optional>

#include "bindings_more.h"
#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace py = pybind11;
using fastdistil::DType;
using fastdistil::HiddenArgs;
using fastdistil::TensorView;

namespace {

using Optional = std::optional<TensorView>;

void hidden_mse(const TensorView& student, const TensorView& teacher, const Optional& bias, const TensorView& row_scale,
                const TensorView& rows, const Optional& gradient, int threads) {
  if (student.shape.size() != 2) throw std::invalid_argument("student is not a matrix");
  const int64_t count = student.size(0), columns = student.size(1);
  const DType sums = student.dtype == DType::f64 ? DType::f64 : DType::f32;
  student.expect_rows("student", count, columns, student.dtype).expect_device("student", true);
  teacher.expect_rows("teacher", count, columns, student.dtype).expect_device("teacher", true);
  row_scale.expect_vector("row_scale", count, sums).expect_device("row_scale", true);
  rows.expect_vector("rows", count, sums).expect_device("rows", true);
  HiddenArgs args{};
  if (bias) args.bias = bias->expect_vector("bias", columns, sums).expect_device("bias", true).data;
  if (gradient) {
    args.wide_gradient = gradient->dtype == sums;
    gradient->expect_rows("gradient", count, columns, args.wide_gradient ? sums : student.dtype);
    args.gradient = gradient->expect_device("gradient", true).data, args.gradient_stride = gradient->stride(0);
  }
  args.student = student.data, args.teacher = teacher.data, args.row_scale = row_scale.data, args.rows = rows.data;
  args.rows_count = count, args.columns = columns, args.dtype = student.dtype;
  args.student_stride = student.stride(0), args.teacher_stride = teacher.stride(0);
  py::gil_scoped_release release;
  fastdistil::cpu::hidden_mse(args, threads < 1 ? 1 : threads);
}

}  // namespace

void fastdistil::define_hidden(py::module_& m) {
  m.def("hidden_mse", &hidden_mse, py::arg("student"), py::arg("teacher"), py::arg("bias"), py::arg("row_scale"),
        py::arg("rows"), py::arg("gradient"), py::arg("threads"));
}
