// Memory for large results on the CPU, used again from one call to the next.
//
// A fresh mapping is zeroed page by page when it is first written, which costs a memory-bound kernel more than its own
// work: 245 MB take 76 to 400 ms on a virtual machine, where the KL of that many logits takes 46. The gradient of the
// last step is free by the time the next step wants one, so its memory is kept, marked as something that the system may
// take back whenever it is short of memory (MADV_FREE).
#pragma once

#include <cstddef>

namespace fastdistil::cpu {

class PooledMemory {
 public:
  explicit PooledMemory(size_t bytes);  // contents are whatever was there; throws std::bad_alloc
  ~PooledMemory();                      // back to the pool
  PooledMemory(const PooledMemory&) = delete;
  PooledMemory& operator=(const PooledMemory&) = delete;

  void* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  void* data_;
  size_t bytes_, capacity_;
};

// False where the system cannot take kept memory back, so that none is kept.
bool pool_available();
size_t pool_held();   // bytes in the pool that no PooledMemory uses
void pool_release();  // gives all of them back to the system

}  // namespace fastdistil::cpu
