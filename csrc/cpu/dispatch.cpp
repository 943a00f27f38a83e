#include "dispatch.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastdistil {

#if defined(FD_X86)
namespace avx512 {
void logit(const LogitArgs&, int);
}
namespace avx2 {
void logit(const LogitArgs&, int);
}
#endif
namespace generic {
void logit(const LogitArgs&, int);
}

namespace cpu {
namespace {

enum class Isa { generic, avx2, avx512 };

Isa detect() {
#if defined(FD_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return v4 ? Isa::avx512 : v3 ? Isa::avx2 : Isa::generic;
#else
  return Isa::generic;
#endif
}

const Isa chosen = detect();

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

const char* isa() { return chosen == Isa::avx512 ? "avx512" : chosen == Isa::avx2 ? "avx2" : "generic"; }

void logit(const LogitArgs& args, int threads) {
  if (args.gradient && args.gradient != args.student && !args.keep_unit)
    advise_huge_pages(args.gradient, args.rows * args.gradient_stride * itemsize(args.dtype));
#if defined(FD_X86)
  if (chosen == Isa::avx512) return avx512::logit(args, threads);
  if (chosen == Isa::avx2) return avx2::logit(args, threads);
#endif
  generic::logit(args, threads);
}

}  // namespace cpu
}  // namespace fastdistil
