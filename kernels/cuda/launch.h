// The CUDA kernels as the bindings see them: one function a stem. `stream` is a cudaStream_t.
#pragma once

#include "../../csrc/rules/logit_args.h"

namespace fastdistil::cuda {

// Forward where args.loss is set, backward from args.stats where it is null. Throws std::runtime_error on a launch
// error.
void logit(const LogitArgs& args, void* stream);

}  // namespace fastdistil::cuda
