#include "dispatch.h"

#include <cstdint>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastdistil {

#if defined(FD_X86)
namespace avx512 {
void logit(const LogitArgs&, int);
void attention(const AttentionArgs&, int);
void attention_low_rank(const AttentionArgs&, int);
void hidden_mse(const HiddenArgs&, int);
}  // namespace avx512
namespace avx2 {
void logit(const LogitArgs&, int);
void attention(const AttentionArgs&, int);
void attention_low_rank(const AttentionArgs&, int);
void hidden_mse(const HiddenArgs&, int);
}  // namespace avx2
#endif
namespace generic {
void logit(const LogitArgs&, int);
void attention(const AttentionArgs&, int);
void attention_low_rank(const AttentionArgs&, int);
void hidden_mse(const HiddenArgs&, int);
}  // namespace generic

namespace cpu {
namespace {

struct Isa {
  const char* name;
  void (*logit)(const LogitArgs&, int);
  void (*attention)(const AttentionArgs&, int);
  void (*attention_low_rank)(const AttentionArgs&, int);
  void (*hidden_mse)(const HiddenArgs&, int);
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
  if (v4) found.push_back({"avx512", avx512::logit, avx512::attention, avx512::attention_low_rank, avx512::hidden_mse});
  if (v3) found.push_back({"avx2", avx2::logit, avx2::attention, avx2::attention_low_rank, avx2::hidden_mse});
#endif
  found.push_back({"generic", generic::logit, generic::attention, generic::attention_low_rank, generic::hidden_mse});
  return found;
}

const std::vector<Isa> all = runnable();
const Isa* chosen = &all.front();

// Half of a memory-bound kernel's time is page faults on fresh output: ask for 2 MiB pages where there are many.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (end > begin + 4 * kPage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

int64_t itemsize(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

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

void logit(const LogitArgs& args, int threads) {
  if (args.gradient && args.gradient != args.student && !args.keep_unit)
    advise_huge_pages(args.gradient, args.rows * args.gradient_stride * itemsize(args.dtype));
  chosen->logit(args, threads);
}

void attention(const AttentionArgs& args, int threads) { chosen->attention(args, threads); }

void attention_low_rank(const AttentionArgs& args, int threads) { chosen->attention_low_rank(args, threads); }

void hidden_mse(const HiddenArgs& args, int threads) { chosen->hidden_mse(args, threads); }

}  // namespace cpu
}  // namespace fastdistil
