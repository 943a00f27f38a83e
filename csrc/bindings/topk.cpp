// topk_logit_loss of the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include <pybind11/stl.h>

#include "../cpu/dispatch.h"
#include "bindings.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastdistil {
namespace {

void expect_dense(const TensorView& x, const char* name, int64_t rows, int64_t columns) {
  x.expect_rows(name, rows, columns, DType::f64).expect_device(name, true).expect_contiguous(name);
}

TopkArgs topk_args(const TensorView& student, const TensorView& columns, const TensorView& row_scale,
                   const TensorView& stats, const OptionalView& gradient, double temperature) {
  const DType dtype = student.expect_matrix("student").floating_dtype("student");
  TopkArgs args{};
  args.rows = student.size(0), args.columns = student.size(1), args.dtype = dtype;
  args.k = columns.expect_matrix("columns").size(1);
  student.expect_rows("student", args.rows, args.columns, dtype).expect_device("student", true);
  row_scale.expect_vector("row_scale", args.rows, accumulator_of(dtype)).expect_device("row_scale", true);
  columns.expect_rows("columns", args.rows, args.k, Element::i32).expect_device("columns", true);
  args.named = static_cast<const int32_t*>(columns.expect_contiguous("columns").data);
  expect_dense(stats, "stats", args.rows, kTopkStats + args.k);
  if (gradient) gradient->expect_rows("gradient", args.rows, args.columns, dtype).expect_device("gradient", true);
  args.student = student.data, args.student_stride = student.stride(0);
  args.row_scale = row_scale.data, args.stats = static_cast<double*>(stats.data);
  if (gradient) args.gradient = gradient->data, args.gradient_stride = gradient->stride(0);
  args.temperature = temperature;
  return args;
}

void topk_fwd(const TensorView& student, const TensorView& values, const TensorView& columns, const TensorView& rest,
              const TensorView& row_scale, const TensorView& loss, const TensorView& stats,
              const OptionalView& gradient, int divergence, double beta, int tail, double temperature,
              double value_factor, int threads) {
  TopkArgs args = topk_args(student, columns, row_scale, stats, gradient, temperature);
  expect_dense(values, "values", args.rows, args.k);
  rest.expect_vector("rest", args.rows, DType::f64).expect_device("rest", true);
  loss.expect_vector("loss", args.rows, row_scale.element).expect_device("loss", true);
  if (divergence < 0 || divergence >= kDivergenceCount - 1)  // the last one, mse, is not one of probabilities
    throw std::invalid_argument("divergence " + std::to_string(divergence) + " does not exist");
  if (tail < 0 || tail >= kTailCount) throw std::invalid_argument("tail " + std::to_string(tail) + " does not exist");
  args.values = static_cast<const double*>(values.data), args.rest = static_cast<const double*>(rest.data);
  args.loss = loss.data;
  args.divergence = divergence, args.beta = beta, args.tail = static_cast<Tail>(tail), args.value_factor = value_factor;
  py::gil_scoped_release release;
  cpu::topk(args, threads < 1 ? 1 : threads);
}

void topk_bwd(const TensorView& student, const TensorView& columns, const TensorView& row_scale,
              const TensorView& stats, const TensorView& gradient, const TensorView& dloss, bool keep_unit,
              double temperature, int threads) {
  TopkArgs args = topk_args(student, columns, row_scale, stats, gradient, temperature);
  dloss.expect_vector("dloss", args.rows, row_scale.element).expect_device("dloss", true);
  args.dloss = dloss.data, args.keep_unit = keep_unit;
  py::gil_scoped_release release;
  cpu::topk(args, threads < 1 ? 1 : threads);
}

}  // namespace

void define_topk(py::module_& m) {
  m.def("topk_fwd", &topk_fwd, py::arg("student"), py::arg("values"), py::arg("columns"), py::arg("rest"),
        py::arg("row_scale"), py::arg("loss"), py::arg("stats"), py::arg("gradient"), py::arg("divergence"),
        py::arg("beta"), py::arg("tail"), py::arg("temperature"), py::arg("value_factor"), py::arg("threads"));
  m.def("topk_bwd", &topk_bwd, py::arg("student"), py::arg("columns"), py::arg("row_scale"), py::arg("stats"),
        py::arg("gradient"), py::arg("dloss"), py::arg("keep_unit"), py::arg("temperature"), py::arg("threads"));
}

}  // namespace fastdistil
