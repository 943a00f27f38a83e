// Where logit_cluster.cu keeps two rows: which cluster, which columns in which block, and what blocks share.
#pragma once

#include "hopper.h"
#include "rows.h"

namespace fastdistil {
namespace {

constexpr int kThreads = 256;  // two blocks of them leave each thread 128 registers
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = kThreads;                // packs: one a thread
constexpr int kChunkBytes = (kChunk + 1) * 16;  // a row that is not aligned as the gradient is touches one pack more
constexpr int kMostBlocks = 16;                 // of a cluster; above 8 a GPU may refuse
constexpr int kMostChunks = 28;                 // of each row, a block
constexpr int kBlockBytes = 228'000;            // of chunks, where a multiprocessor holds one block: 227 KB less ours
constexpr int kHalfBytes = 113'000;             // where it holds two
static_assert(kMostChunks <= 32 && 2 * kMostChunks * kChunkBytes >= kBlockBytes, "every chunk has its bit and barrier");

struct Plan {
  int blocks, chunks;  // of a cluster; of each row in a block
  int bytes() const { return 2 * chunks * kChunkBytes; }
};

Plan plan_of(int64_t columns, int itemsize, int blocks) {
  const int64_t packs = columns * itemsize / 16, each = (packs + blocks - 1) / blocks;
  const int64_t chunks = (each + kChunk - 1) / kChunk;
  return {blocks, static_cast<int>(chunks < 1 ? 1 : chunks > 1000 ? 1000 : chunks)};
}

// The smallest cluster that leaves room for a second block on its multiprocessor (while one waits for its cluster, the
// other computes); else the smallest that fits. Not yet measured on a GPU. 0 blocks: the rows do not fit.
Plan cluster_plan(int64_t columns, int itemsize) {
  for (const int room : {kHalfBytes, kBlockBytes})
    for (int blocks = 1; blocks <= 8; blocks *= 2)
      if (plan_of(columns, itemsize, blocks).bytes() <= room) return plan_of(columns, itemsize, blocks);
  const Plan largest = plan_of(columns, itemsize, kMostBlocks);
  return largest.bytes() <= kBlockBytes ? largest : Plan{0, 0};
}

// One row, and this block's share of it: packs of 16 bytes, counted from column `begin` on, where the gradient (the
// student where there is none) is aligned. The few columns outside of all packs are the first block's.
template <class E>
struct Row {
  static constexpr int kPack = Pack<E>::size;
  const E *student, *teacher;
  E* gradient;       // or null
  int begin, end;    // columns in packs, of all blocks
  int first, packs;  // this block's

  Row() = default;
  __device__ Row(const LogitArgs& args, int64_t r)
      : student(static_cast<const E*>(args.student) + r * args.student_stride),
        teacher(static_cast<const E*>(args.teacher) + r * args.teacher_stride),
        gradient(args.gradient ? static_cast<E*>(args.gradient) + r * args.gradient_stride : nullptr) {
    // A pack must not need a byte before the first or behind the last multiple of 16 within either row.
    const int grid = ahead(gradient ? gradient : student), s = ahead(student), t = ahead(teacher);
    begin = grid >= s && grid >= t ? grid : grid + kPack;
    const int columns = static_cast<int>(args.columns);
    const int behind_s = (kPack - ahead(student + columns)) % kPack,
              behind_t = (kPack - ahead(teacher + columns)) % kPack;
    const int room = columns - (behind_s > behind_t ? behind_s : behind_t) - begin, all = room > 0 ? room / kPack : 0;
    if (all == 0) begin = 0;
    end = begin + all * kPack;
    const int blocks = static_cast<int>(hopper::cluster_size()), rank = static_cast<int>(hopper::cluster_rank());
    const int each = (all + blocks - 1) / blocks;
    first = rank * each;
    packs = first + each < all ? each : first < all ? all - first : 0;
  }

  __device__ int chunks() const { return (packs + kChunk - 1) / kChunk; }
  __device__ int column(int pack) const { return begin + (first + pack) * kPack; }
};

// What a block shares, some of it with its cluster. Two of each exchange, so that the next one does not wait for this
// one's readers; three rows, as threads that lag behind may still read the last one while the next is prepared.
template <class E>
struct Board {
  alignas(16) hopper::Barrier full[kMostChunks];
  Part<float> warps[2][kWarps];
  Part<float> blocks[2][kMostBlocks];
  RowTerms<float> terms;  // of the row
  Row<E> rows[3];
};

}  // namespace
}  // namespace fastdistil
