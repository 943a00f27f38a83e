// The cross entropy with labels of the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include <pybind11/stl.h>

#include "../cpu/dispatch.h"
#include "bindings.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastdistil {
namespace {

void cross_entropy_rows(const TensorView& logits, const TensorView& labels, const TensorView& row_scale,
                        const TensorView& loss, const OptionalView& gradient, const OptionalView& whole, int threads) {
  const DType dtype = logits.expect_matrix("logits").floating_dtype("logits");
  if (dtype != DType::f32 && dtype != DType::f64) throw std::invalid_argument("logits is neither float32 nor float64");
  const int64_t rows = logits.size(0), columns = logits.size(1);
  logits.expect_rows("logits", rows, columns, dtype).expect_device("logits", true);
  labels.expect_vector("labels", rows, Element::i64).expect_device("labels", true);
  row_scale.expect_vector("row_scale", rows, dtype).expect_device("row_scale", true);
  loss.expect_vector("loss", rows, dtype).expect_device("loss", true);
  if (gradient) gradient->expect_rows("gradient", rows, columns, dtype).expect_device("gradient", true);
  if (whole) whole->expect_rows("whole", rows, 2, dtype).expect_device("whole", true).expect_contiguous("whole");
  CrossEntropyArgs args{};
  args.logits = logits.data, args.labels = labels.data, args.row_scale = row_scale.data;
  args.loss = loss.data, args.rows = rows, args.columns = columns, args.dtype = dtype;
  args.logits_stride = logits.stride(0), args.whole = whole ? whole->data : nullptr;
  if (gradient) args.gradient = gradient->data, args.gradient_stride = gradient->stride(0);
  py::gil_scoped_release release;
  cpu::cross_entropy(args, threads < 1 ? 1 : threads);
}

}  // namespace

void define_cross_entropy(py::module_& m) {
  m.def("cross_entropy_rows", &cross_entropy_rows, py::arg("logits"), py::arg("labels"), py::arg("row_scale"),
        py::arg("loss"), py::arg("gradient"), py::arg("whole"), py::arg("threads"));
}

}  // namespace fastdistil
