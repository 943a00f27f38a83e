// What bindings.cpp adds to the module for the attention losses.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdistil {

void define_attention(pybind11::module_& m);

}  // namespace fastdistil
