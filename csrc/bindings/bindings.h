// The parts of the module fastdistil._C, one a stem; module.cpp puts them together.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdistil {

void define_acceptance(pybind11::module_& m);
void define_attention(pybind11::module_& m);
void define_contracts(pybind11::module_& m);
void define_cross_entropy(pybind11::module_& m);
void define_hidden(pybind11::module_& m);
void define_logit(pybind11::module_& m);
void define_row_moments(pybind11::module_& m);
void define_sparse(pybind11::module_& m);
void define_topk(pybind11::module_& m);

}  // namespace fastdistil
