// The names and numbers that C++ and Python must agree on: Python's are in fastdistil/contracts, and
// tests/test_house.py compares the two.
#include "../cpu/attention_args.h"
#include "../rules/acceptance_args.h"
#include "../rules/hidden_args.h"
#include "../rules/logit_args.h"
#include "../rules/row_moments_args.h"
#include "../rules/sparse_args.h"
#include "../rules/topk_args.h"
#include "bindings.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastdistil {
namespace {

template <int count>
py::tuple names(const char* const (&list)[count]) {
  py::tuple found(count);
  for (int i = 0; i < count; ++i) found[static_cast<size_t>(i)] = list[i];
  return found;
}

}  // namespace

void define_contracts(py::module_& m) {
  py::dict found;
  found["divergences"] = names(kDivergenceNames);
  found["phases"] = names(kPhaseNames);
  found["tails"] = names(kTailNames);
  found["hidden_kinds"] = names(kHiddenKindNames);
  found["attention_kinds"] = names(kAttentionKindNames);
  found["logit_stats"] = static_cast<int>(kStats);
  found["topk_stats"] = static_cast<int>(kTopkStats);
  found["acceptance_levels"] = static_cast<int>(kLevels);
  found["row_moments"] = static_cast<int>(kMoments);
  found["update_columns"] = static_cast<int>(kUpdateColumns);
  found["update_constants"] = static_cast<int>(kUpdateConstants);
  found["high_buckets"] = kHighBuckets;
  found["low_buckets"] = kLowBuckets;
  found["all_buckets"] = kAllBuckets;
  m.attr("contracts") = found;
}

}  // namespace fastdistil
