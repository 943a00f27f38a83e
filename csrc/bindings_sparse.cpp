// The sparse part of the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"
#include "cpu/sparse.h"
#include "sparse_view.h"
#if defined(FD_CUDA)
#include "../kernels/cuda/sparse.h"
#endif

namespace py = pybind11;
using fastdistil::Element;
using fastdistil::FlatView;

namespace {

int at_least_one(int threads) { return threads < 1 ? 1 : threads; }

fastdistil::DType dtype_of(const FlatView& view) { return static_cast<fastdistil::DType>(view.element); }

fastdistil::ChangeArgs change(const FlatView& param, const FlatView& base) {
  param.expect_floating("param").expect_device("param", true);
  base.expect_floating("base").expect_device("base", true).expect_size("base", param.size);
  return {param.data, base.data, param.size, dtype_of(param), dtype_of(base)};
}

bool histogram(const FlatView& param, const FlatView& base, const FlatView& counts, int64_t bucket, int threads) {
  const auto args = change(param, base);
  const bool high = bucket == fastdistil::kAllBuckets;
  if (bucket < fastdistil::kAllBuckets || bucket >= fastdistil::kHighBuckets)
    throw std::invalid_argument("bucket " + std::to_string(bucket) + " does not exist");
  counts.expect("counts", Element::i64).expect_device("counts", true);
  counts.expect_size("counts", high ? fastdistil::kHighBuckets : fastdistil::kLowBuckets);
  py::gil_scoped_release release;
  return fastdistil::cpu::sparse_histogram(args, static_cast<int64_t*>(counts.data), bucket, at_least_one(threads));
}

std::pair<int64_t, int64_t> compact(const FlatView& param, const FlatView& base, const std::optional<FlatView>& out,
                                    int64_t threshold, int64_t ties, int threads) {
  fastdistil::CompactArgs args{};
  args.change = change(param, base);
  if (threshold < 0 || threshold > 0x7fffffff) throw std::invalid_argument("threshold is not 31 bits");
  args.threshold = static_cast<uint32_t>(threshold), args.ties = ties;
  if (out) {
    out->expect_index("out").expect_device("out", true);
    args.out = out->data, args.capacity = out->size, args.wide = out->element == Element::i64;
  }
  py::gil_scoped_release release;
  const auto done = fastdistil::cpu::sparse_compact(args, at_least_one(threads));
  if (done.count < 0) throw std::runtime_error("a tensor changed between the passes of the selection");
  return {done.count, done.ties};
}

fastdistil::cpu::MoveArgs move_args(const FlatView& tensor, const FlatView& index, const FlatView& values) {
  tensor.expect_floating("tensor").expect_device("tensor", true);
  index.expect_index("index").expect_device("index", true);
  values.expect("values", tensor.element).expect_device("values", true).expect_size("values", index.size);
  return {tensor.data, index.data, values.data, index.size, tensor.itemsize(), index.element == Element::i64};
}

void take(const FlatView& tensor, const FlatView& index, const FlatView& values, int threads) {
  const auto args = move_args(tensor, index, values);
  py::gil_scoped_release release;
  fastdistil::cpu::sparse_take(args, at_least_one(threads));
}

void put(const FlatView& tensor, const FlatView& index, const FlatView& values, int threads) {
  const auto args = move_args(tensor, index, values);
  py::gil_scoped_release release;
  fastdistil::cpu::sparse_put(args, at_least_one(threads));
}

// The addresses in the table were checked, tensor by tensor, by the optimizer that owns the tensors.
void update(const FlatView& table, const FlatView& constants, int threads) {
  table.expect("table", Element::i64).expect_device("table", true);
  const int64_t tensors = table.size / fastdistil::kUpdateColumns;
  table.expect_size("table", tensors * fastdistil::kUpdateColumns);
  constants.expect("constants", Element::f64).expect_device("constants", true);
  constants.expect_size("constants", tensors * fastdistil::kUpdateConstants);
  py::gil_scoped_release release;
  fastdistil::cpu::sparse_update(static_cast<const int64_t*>(table.data), static_cast<const double*>(constants.data),
                                 tensors, at_least_one(threads));
}

#if defined(FD_CUDA)

// The addresses in a table were checked, tensor by tensor, by whoever owns the tensors.
fastdistil::cuda::Work work_of(const FlatView& table, int64_t columns, const FlatView& chunks) {
  table.expect("table", Element::i64).expect_device("table", false);
  table.expect_size("table", table.size / columns * columns);
  chunks.expect("chunks", Element::i64).expect_device("chunks", false).expect_size("chunks", chunks.size / 2 * 2);
  return {static_cast<const int64_t*>(table.data), static_cast<const int64_t*>(chunks.data), chunks.size / 2};
}

int64_t* counters(const FlatView& view, const char* name, int64_t size) {
  view.expect(name, Element::i64).expect_device(name, false).expect_size(name, size);
  return static_cast<int64_t*>(view.data);
}

void histogram_cuda(const FlatView& table, const FlatView& chunks, const FlatView& counts, const FlatView& nan,
                    int64_t bucket, uintptr_t stream) {
  const auto work = work_of(table, fastdistil::cuda::kChangeColumns, chunks);
  const bool high = bucket == fastdistil::kAllBuckets;
  int64_t* into = counters(counts, "counts", high ? fastdistil::kHighBuckets : fastdistil::kLowBuckets);
  nan.expect("nan", Element::i32).expect_device("nan", false);
  nan.expect_size("nan", table.size / fastdistil::cuda::kChangeColumns);
  fastdistil::cuda::sparse_histogram(work, into, static_cast<int32_t*>(nan.data), bucket,
                                     reinterpret_cast<void*>(stream));
}

void count_cuda(const FlatView& table, const FlatView& chunks, const FlatView& counts, int64_t threshold,
                uintptr_t stream) {
  const auto work = work_of(table, fastdistil::cuda::kChangeColumns, chunks);
  fastdistil::cuda::sparse_count(work, counters(counts, "counts", 2 * work.count), static_cast<uint32_t>(threshold),
                                 reinterpret_cast<void*>(stream));
}

void write_cuda(const FlatView& table, const FlatView& chunks, const FlatView& offsets, const FlatView& keep,
                const FlatView& out, int64_t threshold, uintptr_t stream) {
  const auto work = work_of(table, fastdistil::cuda::kChangeColumns, chunks);
  out.expect_index("out").expect_device("out", false);
  fastdistil::cuda::sparse_write(work, counters(offsets, "offsets", work.count), counters(keep, "keep", work.count),
                                 out.data, out.element == Element::i64, static_cast<uint32_t>(threshold),
                                 reinterpret_cast<void*>(stream));
}

void update_cuda(const FlatView& table, const FlatView& constants, const FlatView& chunks, uintptr_t stream) {
  const auto work = work_of(table, fastdistil::kUpdateColumns, chunks);
  constants.expect("constants", Element::f64).expect_device("constants", false);
  constants.expect_size("constants", table.size / fastdistil::kUpdateColumns * fastdistil::kUpdateConstants);
  fastdistil::cuda::sparse_update(work, static_cast<const double*>(constants.data), reinterpret_cast<void*>(stream));
}

void define_sparse_cuda(py::module_& m) {
  m.attr("sparse_select_chunk") = fastdistil::cuda::kSelectChunk;
  m.attr("sparse_update_chunk") = fastdistil::cuda::kUpdateChunk;
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

void fastdistil::define_sparse(py::module_& m) {
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
