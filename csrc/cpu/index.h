// Labels, columns and positions that come from a tensor: another thread may write it while a kernel runs, so each is
// read once, and what is read is what is checked and used.
#pragma once

#include <cstdint>

namespace fastdistil {

template <class I>
I read_once(const I* at) {
  return __atomic_load_n(at, __ATOMIC_RELAXED);
}

// Whether 0 <= i < size; also for the widest i.
inline bool inside(int64_t i, int64_t size) { return static_cast<uint64_t>(i) < static_cast<uint64_t>(size); }

}  // namespace fastdistil
