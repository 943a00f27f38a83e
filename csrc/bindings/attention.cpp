// attention_loss of the module fastdistil._C. Checks and forwards; the mathematics is elsewhere.
#include <pybind11/stl.h>

#include "../cpu/dispatch.h"
#include "bindings.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastdistil {
namespace {

[[noreturn]] void refuse(const char* name, const std::string& wanted) {
  throw std::invalid_argument(std::string(name) + " is not " + wanted);
}

HeadsArgs heads(const char* name, const TensorView& x, const TensorView& like) {
  if (x.shape.size() != 4 || x.element != like.element || !x.on_cpu || x.size(0) != like.size(0) ||
      x.size(2) != like.size(2) || (x.size(3) > 1 && x.stride(3) != 1))
    refuse(name, "a (B, heads, S, d) CPU tensor with dense rows and student_q's dtype, B and S");
  return {x.data, x.size(1), x.size(3), x.stride(0), x.stride(1), x.stride(2)};
}

// A contiguous tensor of this shape, in the dtype that is summed in.
void* dense(const char* name, const TensorView& x, const std::vector<int64_t>& shape, DType dtype) {
  if (x.shape != shape || x.element != element_of(dtype) || !x.on_cpu || !x.contiguous())
    refuse(name, "a contiguous CPU tensor of the expected shape and dtype");
  return x.data;
}

void check_offsets(const std::vector<int64_t>& offsets, int64_t batch, int64_t length) {
  if (offsets.empty()) return;
  bool rising = batch == 1 && offsets.front() == 0 && offsets.back() == length;
  for (size_t i = 1; i < offsets.size(); ++i) rising = rising && offsets[i - 1] <= offsets[i];
  if (!rising) refuse("offsets", "a list that rises from 0 to S, with B = 1");
}

void attention(const TensorView& student_q, const TensorView& student_k, const TensorView& teacher_q,
               const TensorView& teacher_k, const OptionalView& real, const TensorView& row_scale,
               const TensorView& rows, const OptionalView& dq, const OptionalView& dk,
               const std::vector<int64_t>& offsets, int kind, bool causal, double student_scale, double teacher_scale,
               bool low_rank, int threads) {
  const DType dtype = student_q.floating_dtype("student_q"), sums = accumulator_of(dtype);
  AttentionArgs args{};
  args.student_q = heads("student_q", student_q, student_q), args.student_k = heads("student_k", student_k, student_q);
  args.teacher_q = heads("teacher_q", teacher_q, student_q), args.teacher_k = heads("teacher_k", teacher_k, student_q);
  const int64_t batch = student_q.size(0), length = student_q.size(2), size = student_q.size(3);
  const int64_t query_heads = args.student_q.heads;
  if (args.student_k.size != size || args.teacher_k.size != args.teacher_q.size)
    refuse("a key", "as wide as its query");
  if (args.teacher_q.heads != query_heads) refuse("teacher_q", "of as many heads as student_q");
  for (const HeadsArgs* keys : {&args.student_k, &args.teacher_k})
    if (keys->heads < 1 || query_heads % keys->heads != 0)
      refuse("a key's number of heads", "a divisor of its query's");
  if (kind < 0 || kind >= kAttentionKindCount) refuse("kind", "one of the rules");
  args.kind = static_cast<AttentionKind>(kind);
  if (low_rank && (args.kind != AttentionKind::score_mse || causal))
    refuse("low_rank", "for anything but score_mse without a causal mask");
  check_offsets(offsets, batch, length);
  if (real) args.real = dense("real", *real, {batch, length}, sums);
  args.row_scale = dense("row_scale", row_scale, {batch, query_heads, length}, sums);
  args.rows = dense("rows", rows, {batch, query_heads, length}, sums);
  if (dq.has_value() != dk.has_value()) refuse("dq", "given together with dk");
  if (dq) args.dq = dense("dq", *dq, {batch, query_heads, length, size}, sums);
  if (dk) args.dk = dense("dk", *dk, {batch, args.student_k.heads, length, size}, sums);
  args.batch = batch, args.length = length, args.offsets = offsets, args.dtype = dtype;
  args.causal = causal, args.student_scale = student_scale, args.teacher_scale = teacher_scale;
  if (query_heads == 0) return;
  py::gil_scoped_release release;
  threads = threads < 1 ? 1 : threads;
  if (!low_rank || !cpu::attention_low_rank(args, threads)) cpu::attention(args, threads);
}

}  // namespace

void define_attention(py::module_& m) {
  m.def("attention", &attention, py::arg("student_q"), py::arg("student_k"), py::arg("teacher_q"), py::arg("teacher_k"),
        py::arg("real"), py::arg("row_scale"), py::arg("rows"), py::arg("dq"), py::arg("dk"), py::arg("offsets"),
        py::arg("kind"), py::arg("causal"), py::arg("student_scale"), py::arg("teacher_scale"), py::arg("low_rank"),
        py::arg("threads"));
}

}  // namespace fastdistil
