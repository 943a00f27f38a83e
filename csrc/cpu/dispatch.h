// The CPU kernels as the rest of the extension sees them: one function a stem, the instruction set chosen at run time.
#pragma once

#include "../rules/logit_args.h"

namespace fastdistil::cpu {

// The instruction set in use: "avx512", "avx2" or "generic".
const char* isa();

// Forward where args.loss is set, backward from args.stats where it is null.
void logit(const LogitArgs& args, int threads);

}  // namespace fastdistil::cpu
