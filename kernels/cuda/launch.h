// The CUDA kernels as the bindings see them: one function a stem. `stream` is a cudaStream_t.
#pragma once

#include "../../csrc/rules/logit_args.h"

namespace fastdistil::cuda {

// Forward where args.loss is set, backward from args.stats where it is null. Throws std::runtime_error on a launch
// error.
void logit(const LogitArgs& args, void* stream);

// Blocks of a cluster that holds a row on the chip (sm_90), or what else may be asked for.
constexpr int kChooseCluster = -1;  // by the row's size
constexpr int kTwoReads = 0;        // no cluster: the kernel that reads each logit twice

// What `logit` uses from now on, for tests and benchmarks: -1, or 0, or 1 to 16 blocks.
void use_cluster(int blocks);

// A whole row in one read (logit_cluster.cu); false where that kernel is not for this GPU, size or call.
bool logit_cluster(const LogitArgs& args, int blocks, void* stream);

}  // namespace fastdistil::cuda
