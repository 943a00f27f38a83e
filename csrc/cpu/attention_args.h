// What one launch of the CPU attention kernels needs. Plain data: no templates, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "../rules/logit_args.h"

namespace fastdistil {

#define FD_ATTENTION_KINDS(X) X(prob_mse) X(prob_kl) X(score_mse)
FD_NAMED_ENUM(AttentionKind, FD_ATTENTION_KINDS)

// Queries or keys (B, heads, S, size), or packed (1, heads, total, size); unit stride along the last axis.
struct HeadsArgs {
  const void* data;
  int64_t heads, size;
  int64_t batch_stride, head_stride, row_stride;  // in elements
};

struct AttentionArgs {
  HeadsArgs student_q, student_k, teacher_q, teacher_k;
  const void* real;              // (B, S) in row_scale's dtype: 0 = no key, or null
  const void* row_scale;         // (B, H, S) float32, float64 for float64 inputs; rows of scale 0 are not read
  void* rows;                    // (B, H, S) as row_scale
  void* dq;                      // (B, H, S, size) as row_scale, or null
  void* dk;                      // (B, key heads, S, size) as row_scale, or null
  int64_t batch, length;         // B, S (1 and the total for packed sequences)
  std::vector<int64_t> offsets;  // packed: sequence i is rows offsets[i] to offsets[i + 1]; else empty
  DType dtype;
  AttentionKind kind;
  bool causal;
  double student_scale, teacher_scale;
};

}  // namespace fastdistil
