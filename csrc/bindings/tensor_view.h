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

  // Of a small loss's time the conversion of its tensors is a tenth: the names are made once, and the tuples are read
  // where they lie.
  bool load(handle source, bool) {
    using fastdistil::Element;
    static const Names names;
    if (!source || !PyObject_TypeCheck(source.ptr(), reinterpret_cast<PyTypeObject*>(names.tensor))) return false;
    const object dtype = get(source, names.dtype);
    bool known = false;
    for (const auto& [object, name] : names.dtypes)
      if (object == dtype.ptr()) value.element = name, known = true;
    if (!known) throw type_error("expected a float32, bfloat16, float16, float64, int32 or int64 tensor");
    value.data = PyLong_AsVoidPtr(call(source, names.data_ptr).ptr());
    read(get(source, names.shape), value.shape);
    read(call(source, names.stride), value.strides);
    value.on_cpu = get(source, names.is_cpu).ptr() == Py_True;
    if (PyErr_Occurred()) throw error_already_set();
    for (const int64_t stride : value.strides)
      if (stride < 0) throw value_error("a tensor has a negative stride, expected none");
    if (value.data == nullptr && value.elements() != 0)
      throw value_error("a tensor of " + std::to_string(value.elements()) + " elements has no memory, expected some");
    return true;
  }

 private:
  struct Names {
    PyObject *tensor, *dtype, *data_ptr, *shape, *stride, *is_cpu;
    std::vector<std::pair<PyObject*, fastdistil::Element>> dtypes;

    Names() {
      using fastdistil::Element;
      const module_ torch = module_::import("torch");
      auto pointer = [&](const char* name) { return object(torch.attr(name)).release().ptr(); };
      tensor = pointer("Tensor");
      dtype = PyUnicode_InternFromString("dtype"), data_ptr = PyUnicode_InternFromString("data_ptr");
      shape = PyUnicode_InternFromString("shape"), stride = PyUnicode_InternFromString("stride");
      is_cpu = PyUnicode_InternFromString("is_cpu");
      dtypes = {{pointer("float32"), Element::f32}, {pointer("bfloat16"), Element::bf16},
                {pointer("float16"), Element::f16}, {pointer("float64"), Element::f64},
                {pointer("int32"), Element::i32},   {pointer("int64"), Element::i64}};
    }
  };

  static object own(PyObject* found) {
    if (found == nullptr) throw error_already_set();
    return reinterpret_steal<object>(found);
  }
  static object get(handle source, PyObject* name) { return own(PyObject_GetAttr(source.ptr(), name)); }
  static object call(handle source, PyObject* name) {
    return own(PyObject_CallMethodObjArgs(source.ptr(), name, nullptr));
  }
  static void read(const object& sizes, std::vector<int64_t>& into) {
    const tuple found = reinterpret_borrow<tuple>(sizes);
    into.resize(found.size());
    for (size_t i = 0; i < into.size(); ++i) into[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(found.ptr(), i));
  }
};

}  // namespace pybind11::detail
