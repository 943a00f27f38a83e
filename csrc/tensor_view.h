// A torch.Tensor as a C++ argument, without torch's headers: what its Python attributes say, checked on the way in.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "rules/logit_args.h"

namespace fastdistil {

struct TensorView {
  void* data = nullptr;
  std::vector<int64_t> shape, strides;  // strides in elements
  DType dtype{};
  bool on_cpu = true;

  int64_t size(int dim) const { return shape[static_cast<size_t>(dim)]; }
  int64_t stride(int dim) const { return strides[static_cast<size_t>(dim)]; }

  // A matrix whose rows are dense: any row stride, unit column stride.
  const TensorView& expect_rows(const char* name, int64_t rows, int64_t columns, DType wanted) const {
    if (shape.size() != 2 || size(0) != rows || size(1) != columns || (columns > 1 && stride(1) != 1) ||
        dtype != wanted)
      throw std::invalid_argument(std::string(name) + " is not a (" + std::to_string(rows) + ", " +
                                  std::to_string(columns) + ") matrix with dense rows and the expected dtype");
    return *this;
  }

  const TensorView& expect_vector(const char* name, int64_t length, DType wanted) const {
    if (shape.size() != 1 || size(0) != length || (length > 1 && stride(0) != 1) || dtype != wanted)
      throw std::invalid_argument(std::string(name) + " is not a dense vector of " + std::to_string(length) +
                                  " entries with the expected dtype");
    return *this;
  }

  const TensorView& expect_device(const char* name, bool cpu) const {
    if (on_cpu != cpu)
      throw std::invalid_argument(std::string(name) + (cpu ? " is not on the CPU" : " is not on the GPU"));
    return *this;
  }
};

}  // namespace fastdistil

namespace pybind11::detail {

template <>
struct type_caster<fastdistil::TensorView> {
  PYBIND11_TYPE_CASTER(fastdistil::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (!source || !hasattr(source, "data_ptr")) return false;
    static const std::vector<std::pair<PyObject*, fastdistil::DType>> dtypes = [] {
      const module_ torch = module_::import("torch");
      auto pointer = [&](const char* name) { return object(torch.attr(name)).release().ptr(); };
      return std::vector<std::pair<PyObject*, fastdistil::DType>>{{pointer("float32"), fastdistil::DType::f32},
                                                                  {pointer("bfloat16"), fastdistil::DType::bf16},
                                                                  {pointer("float16"), fastdistil::DType::f16},
                                                                  {pointer("float64"), fastdistil::DType::f64}};
    }();
    const object dtype = source.attr("dtype");
    bool known = false;
    for (const auto& [object, name] : dtypes)
      if (object == dtype.ptr()) value.dtype = name, known = true;
    if (!known) throw type_error("expected a float32, bfloat16, float16 or float64 tensor");
    value.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
    value.shape = source.attr("shape").cast<std::vector<int64_t>>();
    value.strides = source.attr("stride")().cast<std::vector<int64_t>>();
    value.on_cpu = source.attr("is_cpu").cast<bool>();
    return true;
  }
};

}  // namespace pybind11::detail
