// What a running grid consists of: settings, shared memory, warps, blocks, fibers.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_host {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
constexpr size_t kStack = (kSanitized ? 512 : 64) << 10;  // bytes a fiber; a sanitizer's frames are larger
constexpr int kPoison = 0xff;                             // NaN in every floating type

enum class Order : int { forward, reversed, random };

struct Settings {
  Order order = Order::forward;
  unsigned seed = 0;
  int workers = 2;            // threads of the host
  int capability = 9;         // compute capability, major
  int active_clusters = 3;    // how many the device is said to hold at once
  int64_t clusters_seen = 0;  // launches of kernels in clusters so far
};
inline Settings settings;

struct Memory {
  std::unique_ptr<char[]> storage;
  char* begin;
  size_t size;

  explicit Memory(size_t size) : storage(new char[size + 128]), size(size) {
    begin = storage.get() + (128 - reinterpret_cast<uintptr_t>(storage.get()) % 128);
    std::memset(begin, kPoison, size);
  }
};

struct Warp {
  unsigned arrived = 0, converging = 0;  // lanes in an exchange, lanes that ask who is active
  uint64_t value[32], result[32];
};

struct Fiber;

struct Block {
  dim3 index;
  unsigned rank;
  int live;  // threads that have not ended
  std::vector<Fiber*> waiting;
  std::vector<Warp> warps;
  std::map<const void*, Memory> shared;  // by the variable's key

  char* memory(const void* key, size_t size) { return shared.try_emplace(key, size).first->second.begin; }

  bool owns(const void* p, size_t bytes) const {
    const char* at = static_cast<const char*>(p);
    return std::any_of(shared.begin(), shared.end(), [&](const auto& entry) {
      return at >= entry.second.begin && at + bytes <= entry.second.begin + entry.second.size;
    });
  }

  // The same place in another block, which must not have ended.
  char* in_peer(const void* p, Block& peer) const {
    if (peer.live == 0) throw std::logic_error("the shared memory of a block that has ended is written to");
    for (const auto& [key, memory] : shared)
      if (p >= memory.begin && p < memory.begin + memory.size)
        return peer.memory(key, memory.size) + (static_cast<const char*>(p) - memory.begin);
    throw std::logic_error("an address of a cluster is not in shared memory");
  }
};

class Cluster;

struct Fiber {
  Cluster* cluster;
  Block* block;
  dim3 thread;
  unsigned lane, position;  // position: in the order
  Warp* warp;
  bool started = false;
  ucontext_t start;
  jmp_buf context;
  void* fake = nullptr;  // what AddressSanitizer keeps of the stack while another one runs
};

inline thread_local Fiber* self = nullptr;

struct Shape {
  dim3 grid, block;
  unsigned cluster = 1;
  size_t dynamic_bytes = 0;
};
inline thread_local Shape shape;

inline char* stack(size_t fiber) {  // kept: a fresh one costs page faults
  static thread_local std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= fiber) stacks.emplace_back(new char[kStack]);
  return stacks[fiber].get();
}

}  // namespace cuda_host
