// The parts of the module fastdistil._C that live in files of their own.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdistil {

void define_attention(pybind11::module_& m);  // bindings_attention.cpp
void define_sparse(pybind11::module_& m);     // bindings_sparse.cpp
void define_terms(pybind11::module_& m);      // bindings_terms.cpp
void define_topk(pybind11::module_& m);       // bindings_topk.cpp

}  // namespace fastdistil
