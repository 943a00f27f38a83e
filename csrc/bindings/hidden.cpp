// hidden_loss of the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include <pybind11/stl.h>

#include "../cpu/dispatch.h"
#include "bindings.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastdistil {
namespace {

void hidden_rows(const TensorView& student, const TensorView& teacher, const OptionalView& bias,
                 const TensorView& row_scale, const TensorView& loss, const OptionalView& gradient, int kind,
                 int threads) {
  const DType student_dtype = student.expect_matrix("student").floating_dtype("student");
  const DType teacher_dtype = teacher.floating_dtype("teacher"), accumulator = row_scale.floating_dtype("row_scale");
  const int64_t rows = student.size(0), columns = student.size(1);
  if (accumulator != DType::f32 && accumulator != DType::f64) throw std::invalid_argument("row_scale is not a float");
  student.expect_rows("student", rows, columns, student_dtype).expect_device("student", true);
  teacher.expect_rows("teacher", rows, columns, teacher_dtype).expect_device("teacher", true);
  row_scale.expect_vector("row_scale", rows, accumulator).expect_device("row_scale", true);
  loss.expect_vector("loss", rows, accumulator).expect_device("loss", true);
  HiddenArgs args{};
  if (bias) bias->expect_vector("bias", columns, accumulator).expect_device("bias", true);
  if (gradient) {
    args.gradient_dtype = gradient->floating_dtype("gradient");
    gradient->expect_rows("gradient", rows, columns, gradient->element).expect_device("gradient", true);
    gradient->expect_contiguous("gradient");
  }
  if (kind < 0 || kind >= kHiddenKindCount)
    throw std::invalid_argument("kind " + std::to_string(kind) + " does not exist");
  args.student = student.data, args.teacher = teacher.data, args.row_scale = row_scale.data, args.loss = loss.data;
  args.bias = bias ? bias->data : nullptr;
  args.rows = rows, args.columns = columns;
  args.student_stride = student.stride(0), args.teacher_stride = teacher.stride(0);
  args.student_dtype = student_dtype, args.teacher_dtype = teacher_dtype, args.accumulator = accumulator;
  if (gradient) args.gradient = gradient->data;
  args.kind = static_cast<HiddenKind>(kind);
  py::gil_scoped_release release;
  cpu::hidden(args, threads < 1 ? 1 : threads);
}

}  // namespace

void define_hidden(py::module_& m) {
  m.def("hidden_rows", &hidden_rows, py::arg("student"), py::arg("teacher"), py::arg("bias"), py::arg("row_scale"),
        py::arg("loss"), py::arg("gradient"), py::arg("kind"), py::arg("threads"));
}

}  // namespace fastdistil
