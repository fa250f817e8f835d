// The query heads of a tile as columns of lanes (block_kernels.h), for both ops that multiply q by
// keys.
#pragma once

#include <cstdint>

#include "cpu/block_kernels.h"
#include "cpu/number.h"

namespace minicpm41::cpu {
namespace {

inline int columns_per_token(const Heads& heads) {
  return (heads.num_q_heads / heads.num_kv_heads + kLanes - 1) / kLanes;
}

// Spreads the heads of one token that share kv head `head` over columns
// [columns][head_dim][kLanes], times `scale`. Lanes without a head are 0.
inline void fill_columns(const Heads& heads, const void* q, int64_t q_stride, int token, int head,
                         float scale, float* columns) {
  const int group_size = heads.num_q_heads / heads.num_kv_heads;
  const int head_dim = heads.head_dim;
  with_storage_type(heads.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* row =
        static_cast<const T*>(q) + token * q_stride + int64_t{head} * group_size * head_dim;
    for (int column = 0; column < columns_per_token(heads); ++column) {
      float* to = columns + int64_t{column} * head_dim * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int member = column * kLanes + lane;
        for (int d = 0; d < head_dim; ++d) {
          to[d * kLanes + lane] =
              member < group_size ? widen(row[int64_t{member} * head_dim + d]) * scale : 0.0f;
        }
      }
    }
  });
}

}  // namespace
}  // namespace minicpm41::cpu
