// The sparse updates of the module fastdistil._C. Checks and forwards; the mathematics is elsewhere. Tensors of any
// shape are one run of elements here.
#include <pybind11/stl.h>

#include "../cpu/sparse.h"
#include "bindings.h"
#include "tensor_view.h"
#if defined(FD_CUDA)
#include "../../kernels/cuda/sparse.h"
#endif

namespace py = pybind11;

namespace fastdistil {
namespace {

const TensorView& dense(const TensorView& x, const char* name, bool cpu) {
  return x.expect_device(name, cpu).expect_contiguous(name);
}

int at_least_one(int threads) { return threads < 1 ? 1 : threads; }

ChangeArgs change(const TensorView& param, const TensorView& base) {
  const DType dtype = param.floating_dtype("param"), base_dtype = base.floating_dtype("base");
  dense(param, "param", true);
  const int64_t size = param.elements();
  dense(base, "base", true).expect_elements("base", size);
  return {param.data, base.data, size, dtype, base_dtype};
}

bool histogram(const TensorView& param, const TensorView& base, const TensorView& counts, int64_t bucket, int threads) {
  const auto args = change(param, base);
  const bool high = bucket == kAllBuckets;
  if (bucket < kAllBuckets || bucket >= kHighBuckets)
    throw std::invalid_argument("bucket " + std::to_string(bucket) + " does not exist");
  dense(counts, "counts", true).expect("counts", Element::i64);
  counts.expect_elements("counts", high ? kHighBuckets : kLowBuckets);
  py::gil_scoped_release release;
  return cpu::sparse_histogram(args, static_cast<int64_t*>(counts.data), bucket, at_least_one(threads));
}

std::pair<int64_t, int64_t> compact(const TensorView& param, const TensorView& base, const OptionalView& out,
                                    int64_t threshold, int64_t ties, int threads) {
  CompactArgs args{};
  args.change = change(param, base);
  if (threshold < 0 || threshold > 0x7fffffff) throw std::invalid_argument("threshold is not 31 bits");
  if (ties < 0) throw std::invalid_argument("ties is " + std::to_string(ties) + ", expected at least 0");
  args.threshold = static_cast<uint32_t>(threshold), args.ties = ties;
  if (out) {
    dense(*out, "out", true).expect_index("out");
    args.out = out->data, args.capacity = out->elements(), args.wide = out->element == Element::i64;
  }
  py::gil_scoped_release release;
  const auto done = cpu::sparse_compact(args, at_least_one(threads));
  if (done.count < 0) throw std::runtime_error("a tensor changed between the passes of the selection");
  return {done.count, done.ties};
}

cpu::MoveArgs move_args(const TensorView& tensor, const TensorView& index, const TensorView& values) {
  tensor.floating_dtype("tensor"), dense(tensor, "tensor", true);
  dense(index, "index", true).expect_index("index");
  dense(values, "values", true).expect("values", tensor.element).expect_elements("values", index.elements());
  return {tensor.data,
          tensor.elements(),
          index.data,
          values.data,
          index.elements(),
          tensor.itemsize(),
          index.element == Element::i64};
}

void expect_inside(bool good) {
  if (!good) throw py::index_error("index holds a position outside of its tensor");
}

void take(const TensorView& tensor, const TensorView& index, const TensorView& values, int threads) {
  const auto args = move_args(tensor, index, values);
  bool good;
  {
    py::gil_scoped_release release;
    good = cpu::sparse_take(args, at_least_one(threads));
  }
  expect_inside(good);
}

void put(const TensorView& tensor, const TensorView& index, const TensorView& values, int threads) {
  const auto args = move_args(tensor, index, values);
  bool good;
  {
    py::gil_scoped_release release;
    good = cpu::sparse_put(args, at_least_one(threads));
  }
  expect_inside(good);
}

// The addresses in the table were checked, tensor by tensor, by the optimizer that owns the tensors.
void update(const TensorView& table, const TensorView& constants, int threads) {
  dense(table, "table", true).expect("table", Element::i64);
  const int64_t tensors = table.elements() / kUpdateColumns;
  table.expect_elements("table", tensors * kUpdateColumns);
  dense(constants, "constants", true).expect("constants", Element::f64);
  constants.expect_elements("constants", tensors * kUpdateConstants);
  bool good;
  {
    py::gil_scoped_release release;
    good = cpu::sparse_update(static_cast<const int64_t*>(table.data), static_cast<const double*>(constants.data),
                              tensors, at_least_one(threads));
  }
  expect_inside(good);
}

#if defined(FD_CUDA)

// The addresses in a table were checked, tensor by tensor, by whoever owns the tensors.
cuda::Work work_of(const TensorView& table, int64_t columns, const TensorView& chunks) {
  dense(table, "table", false).expect("table", Element::i64);
  table.expect_elements("table", table.elements() / columns * columns);
  dense(chunks, "chunks", false).expect("chunks", Element::i64).expect_elements("chunks", chunks.elements() / 2 * 2);
  return {static_cast<const int64_t*>(table.data), static_cast<const int64_t*>(chunks.data), chunks.elements() / 2};
}

int64_t* counters(const TensorView& view, const char* name, int64_t size) {
  dense(view, name, false).expect(name, Element::i64).expect_elements(name, size);
  return static_cast<int64_t*>(view.data);
}

void histogram_cuda(const TensorView& table, const TensorView& chunks, const TensorView& counts, const TensorView& nan,
                    int64_t bucket, uintptr_t stream) {
  const auto work = work_of(table, cuda::kChangeColumns, chunks);
  const bool high = bucket == kAllBuckets;
  int64_t* into = counters(counts, "counts", high ? kHighBuckets : kLowBuckets);
  dense(nan, "nan", false).expect("nan", Element::i32);
  nan.expect_elements("nan", table.elements() / cuda::kChangeColumns);
  cuda::sparse_histogram(work, into, static_cast<int32_t*>(nan.data), bucket, reinterpret_cast<void*>(stream));
}

void count_cuda(const TensorView& table, const TensorView& chunks, const TensorView& counts, int64_t threshold,
                uintptr_t stream) {
  const auto work = work_of(table, cuda::kChangeColumns, chunks);
  cuda::sparse_count(work, counters(counts, "counts", 2 * work.count), static_cast<uint32_t>(threshold),
                     reinterpret_cast<void*>(stream));
}

void write_cuda(const TensorView& table, const TensorView& chunks, const TensorView& offsets, const TensorView& keep,
                const TensorView& out, int64_t threshold, uintptr_t stream) {
  const auto work = work_of(table, cuda::kChangeColumns, chunks);
  dense(out, "out", false).expect_index("out");
  cuda::sparse_write(work, counters(offsets, "offsets", work.count), counters(keep, "keep", work.count), out.data,
                     out.element == Element::i64, static_cast<uint32_t>(threshold), reinterpret_cast<void*>(stream));
}

void update_cuda(const TensorView& table, const TensorView& constants, const TensorView& chunks, uintptr_t stream) {
  const auto work = work_of(table, kUpdateColumns, chunks);
  dense(constants, "constants", false).expect("constants", Element::f64);
  constants.expect_elements("constants", table.elements() / kUpdateColumns * kUpdateConstants);
  cuda::sparse_update(work, static_cast<const double*>(constants.data), reinterpret_cast<void*>(stream));
}

void define_sparse_cuda(py::module_& m) {
  m.attr("sparse_select_chunk") = cuda::kSelectChunk;
  m.attr("sparse_update_chunk") = cuda::kUpdateChunk;
  m.def("sparse_histogram_cuda", &histogram_cuda, py::arg("table"), py::arg("chunks"), py::arg("counts"),
        py::arg("nan"), py::arg("bucket"), py::arg("stream"));
  m.def("sparse_count_cuda", &count_cuda, py::arg("table"), py::arg("chunks"), py::arg("counts"), py::arg("threshold"),
        py::arg("stream"));
  m.def("sparse_write_cuda", &write_cuda, py::arg("table"), py::arg("chunks"), py::arg("offsets"), py::arg("keep"),
        py::arg("out"), py::arg("threshold"), py::arg("stream"));
  m.def("sparse_update_cuda", &update_cuda, py::arg("table"), py::arg("constants"), py::arg("chunks"),
        py::arg("stream"));
}

#endif

}  // namespace

void define_sparse(py::module_& m) {
  m.def("sparse_histogram", &histogram, py::arg("param"), py::arg("base"), py::arg("counts"), py::arg("bucket"),
        py::arg("threads"));
  m.def("sparse_compact", &compact, py::arg("param"), py::arg("base"), py::arg("out"), py::arg("threshold"),
        py::arg("ties"), py::arg("threads"));
  m.def("sparse_take", &take, py::arg("tensor"), py::arg("index"), py::arg("values"), py::arg("threads"));
  m.def("sparse_put", &put, py::arg("tensor"), py::arg("index"), py::arg("values"), py::arg("threads"));
  m.def("sparse_update", &update, py::arg("table"), py::arg("constants"), py::arg("threads"));
#if defined(FD_CUDA)
  define_sparse_cuda(m);
#endif
}

}  // namespace fastdistil
