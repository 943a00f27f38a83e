// A dense torch.Tensor of any shape as one flat run of elements, integers included; checked on the way in.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fastdistil {

enum class Element : int { f32, bf16, f16, f64, i32, i64 };  // the first four as DType

struct FlatView {
  void* data = nullptr;
  int64_t size = 0;  // elements
  Element element{};
  bool on_cpu = true;

  bool floating() const { return element <= Element::f64; }
  int itemsize() const {
    if (element == Element::bf16 || element == Element::f16) return 2;
    return element == Element::f32 || element == Element::i32 ? 4 : 8;
  }

  const FlatView& expect_device(const char* name, bool cpu) const {
    if (on_cpu != cpu)
      throw std::invalid_argument(std::string(name) + (cpu ? " is not on the CPU" : " is not on the GPU"));
    return *this;
  }
  const FlatView& expect_size(const char* name, int64_t wanted) const {
    if (size != wanted)
      throw std::invalid_argument(std::string(name) + " has " + std::to_string(size) + " elements, expected " +
                                  std::to_string(wanted));
    return *this;
  }
  const FlatView& expect(const char* name, Element wanted) const {
    if (element != wanted) throw std::invalid_argument(std::string(name) + " has not the expected dtype");
    return *this;
  }
  const FlatView& expect_floating(const char* name) const {
    if (!floating()) throw std::invalid_argument(std::string(name) + " is not floating");
    return *this;
  }
  const FlatView& expect_index(const char* name) const {
    if (floating()) throw std::invalid_argument(std::string(name) + " is neither int32 nor int64");
    return *this;
  }
};

}  // namespace fastdistil

namespace pybind11::detail {

template <>
struct type_caster<fastdistil::FlatView> {
  PYBIND11_TYPE_CASTER(fastdistil::FlatView, const_name("torch.Tensor"));

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
    if (!source.attr("is_contiguous")().cast<bool>()) throw value_error("expected a contiguous tensor");
    value.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
    value.size = source.attr("numel")().cast<int64_t>();
    value.on_cpu = source.attr("is_cpu").cast<bool>();
    return true;
  }
};

}  // namespace pybind11::detail
