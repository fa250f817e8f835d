// The bodies behind block_kernels.h, for the instruction set of the including file. Internal
// linkage and no standard templates: a shared inline function compiled here could be linked into
// code that must run on machines without these instructions.
#include <cmath>

#include "cpu/block_kernels.h"
#include "cpu/number.h"

namespace minicpm41::cpu {
namespace {

// One machine vector, and the sums kept in registers at a time: enough to hide the latency of the
// multiply-add, few enough not to spill.
#if defined(__AVX512F__)
constexpr int kVector = 16;
constexpr int kSums = 16;
#elif defined(__AVX__)
constexpr int kVector = 8;
constexpr int kSums = 8;
#else
constexpr int kVector = 4;
constexpr int kSums = 8;
#endif
constexpr int kVectors = kLanes / kVector;  // in a column

typedef float Floats __attribute__((vector_size(kVector * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(kVector * 4), aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
inline Floats broadcast(float value) { return value - Floats{}; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// exp of x <= 0 within 2 ulp; 0 below -87.3, where the result would be subnormal. NaN stays NaN.
inline Floats exp_nonpositive(Floats x) {
  const Floats rounder = broadcast(12582912.0f);  // 1.5 * 2^23: leaves the nearest whole number
  const Floats bounded = x < -87.3f ? broadcast(-87.3f) : x;
  const Floats shifted = bounded * 1.44269504f + rounder;
  const Floats whole = shifted - rounder;
  // ln 2 in two parts: the first times any |whole| <= 126 is exact.
  const Floats r = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Words power;
  __builtin_memcpy(&power, &shifted, sizeof power);
  power = (power << 23) + 0x3f800000u;
  Floats scale;
  __builtin_memcpy(&scale, &power, sizeof scale);
  return x < -87.3f ? Floats{} : p * scale;
}

void widen_any(const void* from, int32_t dtype, int64_t n, float* to) {
  with_storage_type(dtype, [=](auto tag) {
    const auto* numbers = static_cast<const decltype(tag)*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = widen(numbers[i]);
  });
}

// kColumns columns against kRows keys at a time: all sums stay in registers.
template <int kColumns>
void dot_columns(const float* keys, int num_keys, int head_dim, const float* const* q,
                 float* const* scores) {
  constexpr int kRows = kSums / (kColumns * kVectors);
  for (int key = 0; key < num_keys; key += kRows) {
    Floats sums[kRows][kColumns * kVectors] = {};
    const float* rows = keys + int64_t{key} * head_dim;
    for (int d = 0; d < head_dim; ++d) {
      Floats lanes[kColumns * kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kColumns * kVectors; ++v) {
        lanes[v] = load(q[v / kVectors] + d * kLanes + v % kVectors * kVector);
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const Floats number = broadcast(rows[row * head_dim + d]);
#pragma GCC unroll 16
        for (int v = 0; v < kColumns * kVectors; ++v) sums[row][v] += number * lanes[v];
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
      for (int v = 0; v < kColumns * kVectors; ++v) {
        store(scores[v / kVectors] + (key + row) * kLanes + v % kVectors * kVector, sums[row][v]);
      }
    }
  }
}

template <int kColumns>
void accumulate_columns(const float* values, int num_keys, int head_dim,
                        const float* const* weights, float* const* out) {
  constexpr int kRows = kSums / (kColumns * kVectors);
  for (int d = 0; d < head_dim; d += kRows) {
    // From 0, and added to out as a whole: rounding grows with a block, not with the context.
    Floats sums[kRows][kColumns * kVectors] = {};
    for (int key = 0; key < num_keys; ++key) {
      const float* numbers = values + int64_t{key} * head_dim + d;
      Floats lanes[kColumns * kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kColumns * kVectors; ++v) {
        lanes[v] = load(weights[v / kVectors] + key * kLanes + v % kVectors * kVector);
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const Floats number = broadcast(numbers[row]);
#pragma GCC unroll 16
        for (int v = 0; v < kColumns * kVectors; ++v) sums[row][v] += number * lanes[v];
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
      for (int v = 0; v < kColumns * kVectors; ++v) {
        float* to = out[v / kVectors] + (d + row) * kLanes + v % kVectors * kVector;
        store(to, load(to) + sums[row][v]);
      }
    }
  }
}

void dot(const float* keys, int num_keys, int head_dim, const float* const* q, int num_columns,
         float* const* scores) {
  const int rounded = (num_keys + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
  int column = 0;
  for (; column + 2 <= num_columns; column += 2) {
    dot_columns<2>(keys, rounded, head_dim, q + column, scores + column);
  }
  if (column < num_columns) dot_columns<1>(keys, rounded, head_dim, q + column, scores + column);
}

void accumulate(const float* values, int num_keys, int head_dim, const float* const* weights,
                int num_columns, float* const* out) {
  int column = 0;
  for (; column + 2 <= num_columns; column += 2) {
    accumulate_columns<2>(values, num_keys, head_dim, weights + column, out + column);
  }
  if (column < num_columns) {
    accumulate_columns<1>(values, num_keys, head_dim, weights + column, out + column);
  }
}

void softmax(float* scores, int num_keys, float* row_max, float* row_sum, float* out,
             int head_dim) {
  for (int v = 0; v < kLanes; v += kVector) {
    const Floats before = load(row_max + v);
    Floats max = before;
    for (int key = 0; key < num_keys; ++key) max = larger(load(scores + key * kLanes + v), max);
    const Floats decay = exp_nonpositive(before - max);
    Floats sum = {};
    for (int key = 0; key < num_keys; ++key) {
      const Floats weight = exp_nonpositive(load(scores + key * kLanes + v) - max);
      store(scores + key * kLanes + v, weight);
      sum += weight;
    }
    store(row_max + v, max);
    store(row_sum + v, load(row_sum + v) * decay + sum);
    for (int d = 0; d < head_dim; ++d) {
      store(out + d * kLanes + v, load(out + d * kLanes + v) * decay);
    }
  }
}

inline float reduce_max(Floats value) {
  float max = value[0];
#pragma GCC unroll 16
  for (int i = 1; i < kVector; ++i) max = value[i] > max ? value[i] : max;
  return max;
}

inline float reduce_sum(Floats value) {
  float sum = value[0];
#pragma GCC unroll 16
  for (int i = 1; i < kVector; ++i) sum += value[i];
  return sum;
}

void group_score(const float* const* scores, const float* const* lse, int num_columns, int num_keys,
                 float* group_scores) {
  for (int key = 0; key < num_keys; ++key) {
    Floats maxima = broadcast(-INFINITY);
    for (int column = 0; column < num_columns; ++column) {
      for (int v = 0; v < kLanes; v += kVector) {
        const Floats value = load(scores[column] + key * kLanes + v) - load(lse[column] + v);
        maxima = larger(value, maxima);
      }
    }
    const float max = reduce_max(maxima);
    Floats sums = {};
    for (int column = 0; column < num_columns; ++column) {
      for (int v = 0; v < kLanes; v += kVector) {
        const Floats value = load(scores[column] + key * kLanes + v) - load(lse[column] + v);
        sums += exp_nonpositive(value - max);
      }
    }
    group_scores[key] = max + std::log(reduce_sum(sums));
  }
}

}  // namespace
}  // namespace minicpm41::cpu
