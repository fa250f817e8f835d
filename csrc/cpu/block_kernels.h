// The inner loops over one block of keys, compiled once for each instruction set.
//
// Everything is laid out for query heads in vector lanes. A column is kLanes heads of one token:
// q [head_dim, kLanes], scores [keys, kLanes], out [head_dim, kLanes]. The 16 heads that share a kv
// head fill one column exactly; other groups pad. So keys and values are read as they lie in their
// pages, softmax needs no reduction across lanes, and each lane's additions run in one fixed order:
// a row's result does not depend on the rows computed beside it.
#pragma once

#include <cstdint>

namespace minicpm41::cpu {

constexpr int kLanes = 16;
// dot() reads whole groups of this many keys, and writes as many scores.
constexpr int kKeyGroup = 16;

struct BlockKernels {
  const char* name;
  // Converts n numbers of a DType to fp32.
  void (*widen)(const void* from, int32_t dtype, int64_t n, float* to);
  // scores[c][key] = sum over d of keys[key][d] * q[c][d]; num_keys is rounded up to kKeyGroup.
  void (*dot)(const float* keys, int num_keys, int head_dim, const float* const* q, int num_columns,
              float* const* scores);
  // One step of online softmax: turns scores into exp(score - row_max), updates row_max and row_sum
  // and rescales out [head_dim, kLanes]. With head_dim 0 only the normaliser is kept.
  void (*softmax)(float* scores, int num_keys, float* row_max, float* row_sum, float* out,
                  int head_dim);
  // out[c][d] += sum over keys of values[key][d] * weights[c][key].
  void (*accumulate)(const float* values, int num_keys, int head_dim, const float* const* weights,
                     int num_columns, float* const* out);
  // group_scores[key] = log of the sum over all lanes of num_columns columns of exp(scores - lse).
  // A lane whose lse is +inf does not count.
  void (*group_score)(const float* const* scores, const float* const* lse, int num_columns,
                      int num_keys, float* group_scores);
};

// nullptr where this build or this machine's compiler target lacks the instruction set.
const BlockKernels* block_kernels_baseline();
const BlockKernels* block_kernels_avx2();
const BlockKernels* block_kernels_avx512();

}  // namespace minicpm41::cpu
