// A torch.Tensor as a C++ argument, without torch's headers: what its Python attributes say, checked on the way in.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../rules/logit_args.h"

namespace fastdistil {

enum class Element : int { f32, bf16, f16, f64, i32, i64 };  // the first four as DType
constexpr Element element_of(DType dtype) { return static_cast<Element>(dtype); }

struct TensorView {
  void* data = nullptr;
  std::vector<int64_t> shape, strides;  // strides in elements
  Element element{};
  bool on_cpu = true;

  int64_t size(int dim) const { return shape[static_cast<size_t>(dim)]; }
  int64_t stride(int dim) const { return strides[static_cast<size_t>(dim)]; }
  int64_t elements() const {
    int64_t found = 1;
    for (const int64_t n : shape) found *= n;
    return found;
  }
  bool floating() const { return element <= Element::f64; }
  int itemsize() const {
    if (element == Element::bf16 || element == Element::f16) return 2;
    return element == Element::f32 || element == Element::i32 ? 4 : 8;
  }
  bool contiguous() const {
    int64_t wanted = 1;
    if (elements() == 0) return true;  // its strides say nothing
    for (size_t i = shape.size(); i-- > 0; wanted *= shape[i])
      if (shape[i] != 1 && strides[i] != wanted) return false;
    return true;
  }

  DType floating_dtype(const char* name) const {
    if (!floating()) refuse(name, "is not floating");
    return static_cast<DType>(element);
  }

  const TensorView& expect(const char* name, Element wanted) const {
    if (element != wanted) refuse(name, "has not the expected dtype");
    return *this;
  }
  const TensorView& expect_index(const char* name) const {
    if (floating()) refuse(name, "is neither int32 nor int64");
    return *this;
  }
  const TensorView& expect_device(const char* name, bool cpu) const {
    if (on_cpu != cpu) refuse(name, cpu ? "is not on the CPU" : "is not on the GPU");
    return *this;
  }
  const TensorView& expect_contiguous(const char* name) const {
    if (!contiguous()) refuse(name, "is not contiguous");
    return *this;
  }
  const TensorView& expect_elements(const char* name, int64_t wanted) const {
    if (elements() != wanted)
      refuse(name, "has " + std::to_string(elements()) + " elements, expected " + std::to_string(wanted));
    return *this;
  }

  // Rows and columns of a matrix.
  const TensorView& expect_matrix(const char* name) const {
    if (shape.size() != 2) refuse(name, "is not a matrix");
    return *this;
  }
  // A matrix whose rows are dense: any row stride, unit column stride.
  const TensorView& expect_rows(const char* name, int64_t rows, int64_t columns, Element wanted) const {
    if (shape.size() != 2 || size(0) != rows || size(1) != columns || (columns > 1 && stride(1) != 1) ||
        element != wanted)
      refuse(name, "is not a (" + std::to_string(rows) + ", " + std::to_string(columns) +
                       ") matrix with dense rows and the expected dtype");
    return *this;
  }
  const TensorView& expect_rows(const char* name, int64_t rows, int64_t columns, DType wanted) const {
    return expect_rows(name, rows, columns, element_of(wanted));
  }
  const TensorView& expect_vector(const char* name, int64_t length, Element wanted) const {
    if (shape.size() != 1 || size(0) != length || (length > 1 && stride(0) != 1) || element != wanted)
      refuse(name, "is not a dense vector of " + std::to_string(length) + " entries with the expected dtype");
    return *this;
  }
  const TensorView& expect_vector(const char* name, int64_t length, DType wanted) const {
    return expect_vector(name, length, element_of(wanted));
  }

 private:
  [[noreturn]] static void refuse(const char* name, const std::string& what) {
    throw std::invalid_argument(std::string(name) + " " + what);
  }
};

using OptionalView = std::optional<TensorView>;

inline DType accumulator_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace fastdistil

namespace pybind11::detail {

template <>
struct type_caster<fastdistil::TensorView> {
  PYBIND11_TYPE_CASTER(fastdistil::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    using fastdistil::Element;
    if (!source || !hasattr(source, "data_ptr")) return false;
    static const std::vector<std::pair<PyObject*, Element>> dtypes = [] {
      const module_ torch = module_::import("torch");
      auto pointer = [&](const char* name) { return object(torch.attr(name)).release().ptr(); };
      return std::vector<std::pair<PyObject*, Element>>{
          {pointer("float32"), Element::f32}, {pointer("bfloat16"), Element::bf16}, {pointer("float16"), Element::f16},
          {pointer("float64"), Element::f64}, {pointer("int32"), Element::i32},     {pointer("int64"), Element::i64}};
    }();
    const object dtype = source.attr("dtype");
    bool known = false;
    for (const auto& [object, name] : dtypes)
      if (object == dtype.ptr()) value.element = name, known = true;
    if (!known) throw type_error("expected a float32, bfloat16, float16, float64, int32 or int64 tensor");
    value.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
    value.shape = source.attr("shape").cast<std::vector<int64_t>>();
    value.strides = source.attr("stride")().cast<std::vector<int64_t>>();
    value.on_cpu = source.attr("is_cpu").cast<bool>();
    return true;
  }
};

}  // namespace pybind11::detail
