// A block's share of two rows in chunks of shared memory: filled by bulk copies, read by all threads, handed to the
// next row as soon as the last pass is through with them.
#pragma once

#include "cluster_rows.h"

namespace fastdistil {
namespace {

template <class E>
class Chunks {
  static constexpr int kPack = Pack<E>::size, kGroup = 4;
  const int64_t& columns_;  // of a whole row
  hopper::Barrier* full_;   // a chunk's: its copies have arrived
  unsigned char* memory_;   // chunks of (student, teacher)
  uint32_t parities_ = 0;   // of the chunks' next phases

  __device__ unsigned char* chunk(int c, int side) const { return memory_ + (2 * c + side) * kChunkBytes; }

  __device__ static uint32_t offset(const E* p) { return reinterpret_cast<uintptr_t>(p) % 16; }

  // This thread's pack of a chunk, wherever it begins.
  __device__ static Pack<E> read(const unsigned char* from, uint32_t offset) {
    const unsigned char* at = from + threadIdx.x * 16 + offset;
    if (offset == 0) return *reinterpret_cast<const Pack<E>*>(at);
    Pack<E> pack;
#pragma unroll
    for (int j = 0; j < kPack; ++j) pack.element[j] = reinterpret_cast<const E*>(at)[j];
    return pack;
  }

  template <int kColumns, class Action>
  __device__ static void call(const E* student, const E* teacher, const Tempering<float>& tempering, Action& action,
                              E* out) {
    Scores<float> found[kColumns];
    bool near = true;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      found[j] = scores(to_compute(student[j]), to_compute(teacher[j]), tempering);
      near = near && math::magnitude(found[j].d) <= float(kNear);
    }
    action(found, near, out);
  }

 public:
  __device__ Chunks(const int64_t& columns, hopper::Barrier* full, unsigned char* memory)
      : columns_(columns), full_(full), memory_(memory) {}

  // By one thread: both rows' packs of a chunk, from the multiple of 16 bytes before them to the one behind.
  __device__ void fill(const Row<E>& row, int c) const {
    const int rest = row.packs - c * kChunk, packs = rest < kChunk ? rest : kChunk;
    const E* from[2] = {row.student + row.column(c * kChunk), row.teacher + row.column(c * kChunk)};
    uint32_t bytes[2];
    for (int side = 0; side < 2; ++side) bytes[side] = 16 * (packs + (offset(from[side]) ? 1 : 0));
    hopper::expect(full_ + c, bytes[0] + bytes[1]);
    for (int side = 0; side < 2; ++side)
      hopper::copy(chunk(c, side), reinterpret_cast<const unsigned char*>(from[side]) - offset(from[side]), bytes[side],
                   full_ + c);
  }

  // Calls action(scores[n], near, out) for this thread's columns, few at a time for want of registers; with kWrite
  // `out` goes to the gradient. kWait: the first pass, behind the copies. `next`: the last pass, which hands each chunk
  // to the next row.
  template <bool kWait, bool kWrite, class Action>
  __device__ void for_columns(const Row<E>& row, const Row<E>* next, Tempering<float> tempering, Action&& action) {
    tempering.equal = true, tempering.shift = tempering.student;  // as the compiler cannot know: no double is needed
    const int packs = row.packs, first = row.column(threadIdx.x), refills = next ? next->chunks() : 0;
    const uint32_t student = offset(row.student + row.begin), teacher = offset(row.teacher + row.begin);
    for (int c = 0; c * kChunk < packs || c < refills; ++c) {
      if (kWait) {
        hopper::wait(full_ + c, parities_ >> c & 1);
        parities_ ^= 1u << c;
      }
      if (c * kChunk + static_cast<int>(threadIdx.x) < packs) {
        const Pack<E> s = read(chunk(c, 0), student), t = read(chunk(c, 1), teacher);
        Pack<E> out;
#pragma unroll
        for (int j = 0; j < kPack; j += kGroup)
          call<kGroup>(s.element + j, t.element + j, tempering, action, out.element + j);
        if (kWrite) *reinterpret_cast<Pack<E>*>(row.gradient + first + c * kChunk * kPack) = out;
      }
      if (c < refills) {
        __syncthreads();  // everybody has read the chunk
        if (threadIdx.x == 0) fill(*next, c);
      }
    }
    if (hopper::cluster_rank() != 0) return;
    const int edge = row.begin + (static_cast<int>(columns_) - row.end);
    for (int i = threadIdx.x; i < edge; i += kThreads) {
      const int column = i < row.begin ? i : i - row.begin + row.end;
      E out;
      call<1>(row.student + column, row.teacher + column, tempering, action, &out);
      if (kWrite) row.gradient[column] = out;
    }
  }
};

}  // namespace
}  // namespace fastdistil
