// The moments of rows of the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include "../cpu/dispatch.h"
#include "bindings.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastdistil {
namespace {

void row_moments(const TensorView& student, const TensorView& teacher, const TensorView& row_scale,
                 const TensorView& moments, double student_temperature, double teacher_temperature, int threads) {
  const DType dtype = student.expect_matrix("student").floating_dtype("student"), accumulator = accumulator_of(dtype);
  const int64_t rows = student.size(0), columns = student.size(1);
  student.expect_rows("student", rows, columns, dtype).expect_device("student", true);
  teacher.expect_rows("teacher", rows, columns, dtype).expect_device("teacher", true);
  row_scale.expect_vector("row_scale", rows, accumulator).expect_device("row_scale", true);
  moments.expect_rows("moments", rows, kMoments, accumulator).expect_device("moments", true);
  moments.expect_contiguous("moments");
  RowMomentsArgs args{};
  args.student = student.data, args.teacher = teacher.data, args.row_scale = row_scale.data;
  args.moments = moments.data, args.rows = rows, args.columns = columns, args.dtype = dtype;
  args.student_stride = student.stride(0), args.teacher_stride = teacher.stride(0);
  args.student_temperature = student_temperature, args.teacher_temperature = teacher_temperature;
  py::gil_scoped_release release;
  cpu::row_moments(args, threads < 1 ? 1 : threads);
}

}  // namespace

void define_row_moments(py::module_& m) {
  m.def("row_moments", &row_moments, py::arg("student"), py::arg("teacher"), py::arg("row_scale"), py::arg("moments"),
        py::arg("student_temperature"), py::arg("teacher_temperature"), py::arg("threads"));
}

}  // namespace fastdistil
