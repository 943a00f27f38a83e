#include "pool.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastdistil::cpu {

#if defined(__linux__)

namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kMostBlocks = 4;  // kept at a time: a step has few results of this size

struct Block {
  void* data;
  size_t capacity;
};

std::mutex mutex;
std::vector<Block>& blocks() {
  static auto* kept = new std::vector<Block>;  // never destroyed: tensors may outlive static objects
  return *kept;
}

// The smallest kept block that fits and wastes at most half of itself.
bool take(size_t bytes, Block& found) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto best = blocks().end();
  for (auto it = blocks().begin(); it != blocks().end(); ++it)
    if (it->capacity >= bytes && it->capacity / 2 <= bytes && (best == blocks().end() || it->capacity < best->capacity))
      best = it;
  if (best == blocks().end()) return false;
  found = *best;
  blocks().erase(best);
  return true;
}

}  // namespace

PooledMemory::PooledMemory(size_t bytes) : bytes_(bytes) {
  Block block{};
  if (!take(bytes, block)) {
    block.capacity = (std::max<size_t>(bytes, 1) + kHugePage - 1) & ~(kHugePage - 1);
    block.data = mmap(nullptr, block.capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block.data == MAP_FAILED) throw std::bad_alloc();
    madvise(block.data, block.capacity, MADV_HUGEPAGE);  // a page fault per 2 MiB instead of one per 4 KiB
  }
  data_ = block.data, capacity_ = block.capacity;
}

PooledMemory::~PooledMemory() {
  Block surplus{nullptr, 0};
  madvise(data_, capacity_, MADV_FREE);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    blocks().push_back({data_, capacity_});
    if (blocks().size() > kMostBlocks) {
      surplus = blocks().front();
      blocks().erase(blocks().begin());
    }
  }
  if (surplus.data) munmap(surplus.data, surplus.capacity);
}

bool pool_available() { return true; }

size_t pool_held() {
  const std::lock_guard<std::mutex> lock(mutex);
  size_t held = 0;
  for (const Block& block : blocks()) held += block.capacity;
  return held;
}

void pool_release() {
  std::vector<Block> released;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    released.swap(blocks());
  }
  for (const Block& block : released) munmap(block.data, block.capacity);
}

#else

PooledMemory::PooledMemory(size_t bytes) : data_(::operator new(bytes)), bytes_(bytes), capacity_(bytes) {}
PooledMemory::~PooledMemory() { ::operator delete(data_); }
bool pool_available() { return false; }
size_t pool_held() { return 0; }
void pool_release() {}

#endif

}  // namespace fastdistil::cpu
