// What bindings.cpp adds to the module, a stem each.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdistil {

void define_attention(pybind11::module_& m);
void define_hidden(pybind11::module_& m);

}  // namespace fastdistil
