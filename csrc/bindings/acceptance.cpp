// The acceptance of rows of the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include "../cpu/dispatch.h"
#include "bindings.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastdistil {
namespace {

void acceptance(const TensorView& student, const TensorView& teacher, const TensorView& row_scale,
                const TensorView& levels, const TensorView& log_acceptance, double student_temperature,
                double teacher_temperature, int threads) {
  const DType dtype = student.expect_matrix("student").floating_dtype("student"), accumulator = accumulator_of(dtype);
  const int64_t rows = student.size(0), columns = student.size(1);
  student.expect_rows("student", rows, columns, dtype).expect_device("student", true);
  teacher.expect_rows("teacher", rows, columns, dtype).expect_device("teacher", true);
  row_scale.expect_vector("row_scale", rows, accumulator).expect_device("row_scale", true);
  levels.expect_rows("levels", rows, kLevels, accumulator).expect_device("levels", true);
  levels.expect_contiguous("levels");
  log_acceptance.expect_vector("log_acceptance", rows, accumulator).expect_device("log_acceptance", true);
  AcceptanceArgs args{};
  args.student = student.data, args.teacher = teacher.data, args.row_scale = row_scale.data;
  args.levels = levels.data, args.log_acceptance = log_acceptance.data;
  args.rows = rows, args.columns = columns, args.dtype = dtype;
  args.student_stride = student.stride(0), args.teacher_stride = teacher.stride(0);
  args.student_temperature = student_temperature, args.teacher_temperature = teacher_temperature;
  py::gil_scoped_release release;
  cpu::acceptance(args, threads < 1 ? 1 : threads);
}

}  // namespace

void define_acceptance(py::module_& m) {
  m.def("acceptance", &acceptance, py::arg("student"), py::arg("teacher"), py::arg("row_scale"), py::arg("levels"),
        py::arg("log_acceptance"), py::arg("student_temperature"), py::arg("teacher_temperature"), py::arg("threads"));
}

}  // namespace fastdistil
