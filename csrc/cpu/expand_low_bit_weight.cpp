#include <algorithm>
#include <vector>

#include "cpu/low_bit_weight.h"
#include "cpu/parallel.h"
#include "cpu/settings.h"

namespace minicpm41::cpu {
namespace {

struct Int8 {
  int8_t value;
};
struct Float8E4M3 {
  uint8_t bits;
};

// To nearest, ties to even, beyond the range to its end.
int8_t narrow_to_int8(float value) {
  return static_cast<int8_t>(std::nearbyint(std::fmin(std::fmax(value, -127.0f), 127.0f)));
}

uint8_t narrow_to_e4m3(float value) {
  constexpr float kLargest = 448.0f;
  const uint32_t sign = as_bits(value) >> 24 & 0x80u;
  if (value != value) return static_cast<uint8_t>(sign | 0x7fu);
  const float magnitude = std::fmin(std::fabs(value), kLargest);
  if (magnitude < 0.015625f) {  // subnormal: steps of 2^-9
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 512.0f)));
  }
  const uint32_t bits = as_bits(magnitude) - (120u << 23);  // the exponent's bias becomes 7
  return static_cast<uint8_t>(sign | (bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20);
}

template <typename F>
void with_row_type(int32_t dtype, F f) {
  if (dtype == kInt8) return f(Int8{});
  if (dtype == kFloat8E4M3) return f(Float8E4M3{});
  with_storage_type(dtype, f);
}

template <typename T>
void store(float value, T* to) {
  *to = narrow<T>(value);
}
void store(float value, Int8* to) { to->value = narrow_to_int8(value); }
void store(float value, Float8E4M3* to) { to->bits = narrow_to_e4m3(value); }

// The rows of one tile, fp32 [kTileRows, in_features].
void expand_tile(const LowBitWeight& weight, int row_tile, std::vector<float>& rows) {
  float levels[kChunk * kLanes], scales[kLanes];
  for (int k = 0; k < weight.in_features; k += kChunk) {
    decode_levels(weight, row_tile, k, levels);
    read_scales(weight, row_tile, k, scales);
    for (int row = 0; row < kTileRows; ++row) {
      float* to = rows.data() + int64_t{row} * weight.in_features + k;
      for (int i = 0; i < kChunk; ++i) to[i] = levels[i * kLanes + row] * scales[row];
    }
  }
  for (int64_t i = 0; weight.hadamard > 0 && i < int64_t{kTileRows} * weight.in_features;
       i += weight.hadamard) {
    hadamard(rows.data() + i, weight.hadamard);
  }
}

}  // namespace

Status run_expand_low_bit_weight(const ExpandLowBitWeightParams& params, void* /*stream*/) {
  if (const Status status = validate(params); !status.ok()) return status;
  Settings settings;
  if (const Status status = read_settings("expand_low_bit_weight", settings); !status.ok()) {
    return status;
  }
  const LowBitWeight& weight = params.weight;
  const int64_t in_features = weight.in_features;
  const int tiles = (params.num_rows + kTileRows - 1) / kTileRows;
  std::vector<std::vector<float>> scratch(settings.num_threads,
                                          std::vector<float>(kTileRows * in_features));
  parallel_for(settings.num_threads, tiles, [&](int thread, int64_t tile) {
    std::vector<float>& rows = scratch[thread];
    expand_tile(weight, params.first_row / kTileRows + static_cast<int>(tile), rows);
    const int64_t first = tile * kTileRows;
    for (int64_t row = first; row < std::min<int64_t>(first + kTileRows, params.num_rows); ++row) {
      const bool is_scaled = params.channel_scales != nullptr;
      const float divisor = is_scaled ? params.channel_scales[params.first_row + row] : 1.0f;
      const float* from = rows.data() + (row - first) * in_features;
      with_row_type(params.dtype, [&](auto tag) {
        auto* to = static_cast<decltype(tag)*>(params.out) + row * in_features;
        for (int64_t k = 0; k < in_features; ++k) {
          store(is_scaled ? from[k] / divisor : from[k], to + k);
        }
      });
    }
  });
  return {};
}

}  // namespace minicpm41::cpu
