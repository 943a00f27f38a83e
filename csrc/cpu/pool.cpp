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
constexpr size_t kFewBlocks = 4;               // that many are kept, of any size: a step has few results that large
constexpr size_t kFewBytes = size_t{1} << 28;  // and more of them as long as all together are no larger than this

struct Block {
  void* data;
  size_t capacity;
};

std::mutex mutex;
std::vector<Block>& blocks() {
  static auto* kept = new std::vector<Block>;  // never destroyed: tensors may outlive static objects
  return *kept;
}

size_t bytes_of(const std::vector<Block>& kept) {
  size_t bytes = 0;
  for (const Block& block : kept) bytes += block.capacity;
  return bytes;
}

void unmap(const std::vector<Block>& gone) {
  for (const Block& block : gone) munmap(block.data, block.capacity);
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
  std::vector<Block> surplus;  // the oldest
  madvise(data_, capacity_, MADV_FREE);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    blocks().push_back({data_, capacity_});
    while (blocks().size() > kFewBlocks && bytes_of(blocks()) > kFewBytes) {
      surplus.push_back(blocks().front());
      blocks().erase(blocks().begin());
    }
  }
  unmap(surplus);
}

bool pool_available() { return true; }

size_t pool_held() {
  const std::lock_guard<std::mutex> lock(mutex);
  return bytes_of(blocks());
}

void pool_release() {
  std::vector<Block> released;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    released.swap(blocks());
  }
  unmap(released);
}

#else

PooledMemory::PooledMemory(size_t bytes) : data_(::operator new(bytes)), bytes_(bytes), capacity_(bytes) {}
PooledMemory::~PooledMemory() { ::operator delete(data_); }
bool pool_available() { return false; }
size_t pool_held() { return 0; }
void pool_release() {}

#endif

}  // namespace fastdistil::cpu
