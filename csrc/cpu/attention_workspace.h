// The buffers of one thread of the tiled attention kernel.
#pragma once

#include "attention_heads.h"
#include "attention_tiles.h"

namespace fastdistil {
inline namespace FD_ISA {

// Scores of a block, which become their gradients: 256 KiB of float, in an L2 cache of 1 MiB.
constexpr int64_t kBlockElements = 64 * 1024;
constexpr int64_t kLargestBlock = 256;  // rows

struct Shape {
  int64_t student, teacher;  // head sizes
  int64_t left;              // row stride of the packed query rows: student's, then teacher's
  int64_t inner;             // rows of a panel of the student's keys, with what lies behind them
  int64_t keys, stride;      // most keys; row stride of a block
  int64_t block, columns;    // rows of a block; columns of the gradients
};

template <class T>
Shape shape_of(const AttentionArgs& args) {
  Shape s{};
  s.student = args.student_q.size, s.teacher = args.teacher_q.size, s.left = s.student + s.teacher + Carver<T>::kLine;
  s.inner = s.student + std::max(s.student, s.teacher);
  s.keys = round_up(longest(args), kTileColumns<T>);
  s.stride = s.keys + Carver<T>::kLine;  // a power of two would map a column to one set of the L1 cache
  const int64_t fitting = kBlockElements / std::max<int64_t>(s.keys, 1) / kTileRows * kTileRows;
  const int64_t most = std::min(kLargestBlock, std::max<int64_t>(round_up(longest(args), kTileRows), kTileRows));
  s.block = std::min(std::max<int64_t>(fitting, kTileRows), most);
  s.columns = round_up(s.student, kTileColumns<T>);
  return s;
}

template <class T>
struct Workspace {
  T *teacher_keys, *student_keys, *key_panels, *left, *query_panels, *b, *c, *a, *a_left, *dk, *dq, *means;

  int64_t lay_out(const Shape& s, T* memory) {
    Carver<T> carver{memory};
    carver.take(teacher_keys, s.keys * s.teacher);
    carver.take(student_keys, s.keys * s.inner);
    carver.take(key_panels, s.keys * s.columns), carver.take(dk, s.keys * s.columns);
    carver.take(left, s.block * s.left), carver.take(query_panels, s.block * s.columns);
    carver.take(b, s.block * s.stride), carver.take(c, kTileRows * s.stride), carver.take(a, kTileRows * s.stride);
    carver.take(a_left, kTileRows * s.student), carver.take(dq, kTileRows * s.columns);
    carver.take(means, 2 * s.student + s.teacher);
    return carver.used;
  }
};

}  // namespace FD_ISA
}  // namespace fastdistil
