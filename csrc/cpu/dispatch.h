// The CPU kernels as the rest of the extension sees them: one function a stem, the instruction set chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "../rules/acceptance_args.h"
#include "../rules/cross_entropy_args.h"
#include "../rules/hidden_args.h"
#include "../rules/logit_args.h"
#include "../rules/row_moments_args.h"
#include "../rules/topk_args.h"
#include "attention_args.h"

namespace fastdistil::cpu {

// The instruction set in use, "avx512", "avx2" or "generic": the best that this processor can run, unless a test or a
// benchmark asks for another of those that it can.
const char* isa();
std::vector<std::string> isas();
void use_isa(const std::string& name);

// Forward where args.loss is set, backward from args.stats where it is null.
void logit(const LogitArgs& args, const LabelArgs& labels, int threads);

void hidden(const HiddenArgs& args, int threads);

void cross_entropy(const CrossEntropyArgs& args, int threads);

void row_moments(const RowMomentsArgs& args, int threads);

void acceptance(const AcceptanceArgs& args, int threads);

// As logit.
void topk(const TopkArgs& args, int threads);

// Rows, and gradients where args.dq is set; the second for score_mse of equal head sizes without a causal mask.
void attention(const AttentionArgs& args, int threads);
bool attention_low_rank(const AttentionArgs& args, int threads);  // false: too few digits, call attention

}  // namespace fastdistil::cpu
