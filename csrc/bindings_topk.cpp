// topk_fwd and topk_bwd of the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastdistil {
namespace {

using Optional = std::optional<TensorView>;

void expect_dense(const TensorView& x, const char* name, int64_t rows, int64_t columns) {
  x.expect_rows(name, rows, columns, DType::f64).expect_device(name, true);
  if (rows > 1 && x.stride(0) != columns) throw std::invalid_argument(std::string(name) + " is not contiguous");
}

// TensorView knows floating tensors; this one is int32.
const int32_t* column_indices(const py::object& x, int64_t rows, int64_t& k) {
  static const py::handle int32 = py::object(py::module_::import("torch").attr("int32")).release();
  const auto shape = x.attr("shape").cast<std::vector<int64_t>>();
  const py::object dtype = x.attr("dtype");
  if (!dtype.is(int32) || !x.attr("is_cpu").cast<bool>() || !x.attr("is_contiguous")().cast<bool>() ||
      shape.size() != 2 || shape[0] != rows)
    throw std::invalid_argument("columns is not a dense (" + std::to_string(rows) + ", K) int32 matrix on the CPU");
  k = shape[1];
  return reinterpret_cast<const int32_t*>(x.attr("data_ptr")().cast<uintptr_t>());
}

TopkArgs topk_args(const TensorView& student, const py::object& columns, const TensorView& row_scale,
                   const TensorView& stats, const Optional& gradient, double temperature) {
  if (student.shape.size() != 2) throw std::invalid_argument("student is not a matrix");
  TopkArgs args{};
  args.rows = student.size(0), args.columns = student.size(1), args.dtype = student.dtype;
  student.expect_rows("student", args.rows, args.columns, student.dtype).expect_device("student", true);
  const DType accumulator = student.dtype == DType::f64 ? DType::f64 : DType::f32;
  row_scale.expect_vector("row_scale", args.rows, accumulator).expect_device("row_scale", true);
  args.named = column_indices(columns, args.rows, args.k);
  expect_dense(stats, "stats", args.rows, kTopkStats + args.k);
  if (gradient)
    gradient->expect_rows("gradient", args.rows, args.columns, student.dtype).expect_device("gradient", true);
  args.student = student.data, args.student_stride = student.stride(0);
  args.row_scale = row_scale.data, args.stats = static_cast<double*>(stats.data);
  if (gradient) args.gradient = gradient->data, args.gradient_stride = gradient->stride(0);
  args.temperature = temperature;
  return args;
}

void topk_fwd(const TensorView& student, const TensorView& values, const py::object& columns, const TensorView& rest,
              const TensorView& row_scale, const TensorView& loss, const TensorView& stats, const Optional& gradient,
              int divergence, double beta, int tail, double temperature, double value_factor, int threads) {
  TopkArgs args = topk_args(student, columns, row_scale, stats, gradient, temperature);
  expect_dense(values, "values", args.rows, args.k);
  rest.expect_vector("rest", args.rows, DType::f64).expect_device("rest", true);
  loss.expect_vector("loss", args.rows, row_scale.dtype).expect_device("loss", true);
  if (divergence < 0 || divergence >= kDivergences - 1)  // the last one, mse, is not one of probabilities
    throw std::invalid_argument("divergence " + std::to_string(divergence) + " does not exist");
  if (tail < 0 || tail > 2) throw std::invalid_argument("tail " + std::to_string(tail) + " does not exist");
  args.values = static_cast<const double*>(values.data), args.rest = static_cast<const double*>(rest.data);
  args.loss = loss.data;
  args.divergence = divergence, args.beta = beta, args.tail = static_cast<Tail>(tail), args.value_factor = value_factor;
  py::gil_scoped_release release;
  cpu::topk(args, threads < 1 ? 1 : threads);
}

void topk_bwd(const TensorView& student, const py::object& columns, const TensorView& row_scale,
              const TensorView& stats, const TensorView& gradient, const TensorView& dloss, bool keep_unit,
              double temperature, int threads) {
  TopkArgs args = topk_args(student, columns, row_scale, stats, gradient, temperature);
  dloss.expect_vector("dloss", args.rows, row_scale.dtype).expect_device("dloss", true);
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
