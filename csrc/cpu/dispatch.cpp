#include "dispatch.h"

#include <stdexcept>

namespace fastdistil {

#if defined(FD_X86)
namespace avx512 {
void cross_entropy(const CrossEntropyArgs&, int);
void row_moments(const RowMomentsArgs&, int);
void acceptance(const AcceptanceArgs&, int);
void logit(const LogitArgs&, const LabelArgs&, int);
void hidden(const HiddenArgs&, int);
void topk(const TopkArgs&, int);
void attention(const AttentionArgs&, int);
bool attention_low_rank(const AttentionArgs&, int);
}  // namespace avx512
namespace avx2 {
void cross_entropy(const CrossEntropyArgs&, int);
void row_moments(const RowMomentsArgs&, int);
void acceptance(const AcceptanceArgs&, int);
void logit(const LogitArgs&, const LabelArgs&, int);
void hidden(const HiddenArgs&, int);
void topk(const TopkArgs&, int);
void attention(const AttentionArgs&, int);
bool attention_low_rank(const AttentionArgs&, int);
}  // namespace avx2
#endif
namespace generic {
void cross_entropy(const CrossEntropyArgs&, int);
void row_moments(const RowMomentsArgs&, int);
void acceptance(const AcceptanceArgs&, int);
void logit(const LogitArgs&, const LabelArgs&, int);
void hidden(const HiddenArgs&, int);
void topk(const TopkArgs&, int);
void attention(const AttentionArgs&, int);
bool attention_low_rank(const AttentionArgs&, int);
}  // namespace generic

namespace cpu {
namespace {

struct Isa {
  const char* name;
  void (*logit)(const LogitArgs&, const LabelArgs&, int);
  void (*hidden)(const HiddenArgs&, int);
  void (*cross_entropy)(const CrossEntropyArgs&, int);
  void (*row_moments)(const RowMomentsArgs&, int);
  void (*acceptance)(const AcceptanceArgs&, int);
  void (*topk)(const TopkArgs&, int);
  void (*attention)(const AttentionArgs&, int);
  bool (*attention_low_rank)(const AttentionArgs&, int);
};

// What this processor can run, the best first.
std::vector<Isa> runnable() {
  std::vector<Isa> found;
#if defined(FD_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4)
    found.push_back({"avx512", avx512::logit, avx512::hidden, avx512::cross_entropy, avx512::row_moments,
                     avx512::acceptance, avx512::topk, avx512::attention, avx512::attention_low_rank});
  if (v3)
    found.push_back({"avx2", avx2::logit, avx2::hidden, avx2::cross_entropy, avx2::row_moments, avx2::acceptance,
                     avx2::topk, avx2::attention, avx2::attention_low_rank});
#endif
  found.push_back({"generic", generic::logit, generic::hidden, generic::cross_entropy, generic::row_moments,
                   generic::acceptance, generic::topk, generic::attention, generic::attention_low_rank});
  return found;
}

const std::vector<Isa> all = runnable();
const Isa* chosen = &all.front();

}  // namespace

const char* isa() { return chosen->name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : all) names.emplace_back(isa.name);
  return names;
}

void use_isa(const std::string& name) {
  for (const Isa& isa : all)
    if (name == isa.name) {
      chosen = &isa;
      return;
    }
  throw std::invalid_argument("use_isa: name is '" + name + "', which this processor cannot run");
}

void logit(const LogitArgs& args, const LabelArgs& labels, int threads) { chosen->logit(args, labels, threads); }
void hidden(const HiddenArgs& args, int threads) { chosen->hidden(args, threads); }
void cross_entropy(const CrossEntropyArgs& args, int threads) { chosen->cross_entropy(args, threads); }
void row_moments(const RowMomentsArgs& args, int threads) { chosen->row_moments(args, threads); }
void acceptance(const AcceptanceArgs& args, int threads) { chosen->acceptance(args, threads); }
void topk(const TopkArgs& args, int threads) { chosen->topk(args, threads); }

void attention(const AttentionArgs& args, int threads) { chosen->attention(args, threads); }

bool attention_low_rank(const AttentionArgs& args, int threads) { return chosen->attention_low_rank(args, threads); }

}  // namespace cpu
}  // namespace fastdistil
