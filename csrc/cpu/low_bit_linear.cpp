#include <algorithm>
#include <vector>

#include "cpu/low_bit_weight.h"
#include "cpu/parallel.h"
#include "cpu/settings.h"

namespace minicpm41::cpu {
namespace {

// Tokens at a time: bounds the fp32 copy of x.
constexpr int kTokens = 256;

// x in fp32, its Hadamard transform taken, as [in_features / kChunk, rows, kChunk]; rows beyond
// `count` are 0.
void load_tokens(const LowBitLinearParams& params, int first, int count, int rows,
                 std::vector<float>& chunks) {
  const LowBitWeight& weight = params.weight;
  const int in_features = weight.in_features;
  std::fill(chunks.begin(), chunks.end(), 0.0f);
  std::vector<float> row(in_features);
  for (int token = 0; token < count; ++token) {
    with_storage_type(params.dtype, [&](auto tag) {
      const auto* from =
          static_cast<const decltype(tag)*>(params.x) + int64_t{first + token} * in_features;
      for (int k = 0; k < in_features; ++k) row[k] = widen(from[k]);
    });
    for (int k = 0; weight.hadamard > 0 && k < in_features; k += weight.hadamard) {
      hadamard(row.data() + k, weight.hadamard);
    }
    for (int k = 0; k < in_features; k += kChunk) {
      std::copy_n(row.data() + k, kChunk,
                  chunks.data() + (int64_t{k} / kChunk * rows + token) * kChunk);
    }
  }
}

struct Scratch {
  std::vector<float> levels = std::vector<float>(kChunk * kLanes);
  std::vector<float> products = std::vector<float>(kTokens * kLanes);
  std::vector<float> sums = std::vector<float>(kTokens * kLanes);
};

// Each group's product is taken over exact small levels, its scale applied to the sum.
void multiply(const LowBitLinearParams& params, const BlockKernels& kernels, int row_tile,
              const float* chunks, int first, int count, int rows, Scratch& scratch) {
  const LowBitWeight& weight = params.weight;
  const float* levels = scratch.levels.data();
  float* products = scratch.products.data();
  float* sums = scratch.sums.data();
  std::fill_n(sums, rows * kLanes, 0.0f);
  for (int k = 0; k < weight.in_features; k += kChunk) {
    decode_levels(weight, row_tile, k, scratch.levels.data());
    kernels.dot(chunks + int64_t{k} * rows, rows, kChunk, &levels, 1, &products);
    float scales[kLanes];
    read_scales(weight, row_tile, k, scales);
    for (int i = 0; i < rows * kLanes; ++i) sums[i] += products[i] * scales[i % kLanes];
  }
  const int row = row_tile * kTileRows;
  const int valid = std::min(kTileRows, weight.out_features - row);
  with_storage_type(params.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int token = 0; token < count; ++token) {
      T* to = static_cast<T*>(params.out) + int64_t{first + token} * weight.out_features + row;
      for (int r = 0; r < valid; ++r) to[r] = narrow<T>(sums[token * kLanes + r]);
    }
  });
}

}  // namespace

Status run_low_bit_linear(const LowBitLinearParams& params, void* /*stream*/) {
  if (const Status status = validate(params); !status.ok()) return status;
  Settings settings;
  if (const Status status = read_settings("low_bit_linear", settings); !status.ok()) return status;
  const int most = std::min(kTokens, (params.num_tokens + kKeyGroup - 1) / kKeyGroup * kKeyGroup);
  std::vector<float> chunks(int64_t{most} * params.weight.in_features);
  std::vector<Scratch> scratch(settings.num_threads);
  for (int first = 0; first < params.num_tokens; first += kTokens) {
    const int count = std::min(kTokens, params.num_tokens - first);
    const int rows = (count + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
    load_tokens(params, first, count, rows, chunks);
    parallel_for(settings.num_threads, tile_rows(params.weight), [&](int thread, int64_t tile) {
      multiply(params, *settings.kernels, static_cast<int>(tile), chunks.data(), first, count, rows,
               scratch[thread]);
    });
  }
  return {};
}

}  // namespace minicpm41::cpu
