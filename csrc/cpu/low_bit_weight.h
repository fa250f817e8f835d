// A low-bit weight's tiles taken apart (params.h has their layout), and the Hadamard transform.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/block_kernels.h"
#include "cpu/number.h"
#include "validate.h"

namespace minicpm41::cpu {
namespace {

// Columns decoded at a time: no scale and no Hadamard block is smaller.
constexpr int kChunk = 64;
static_assert(kTileRows == kLanes, "a tile's rows fill one column of lanes");

// The levels (code - zero / 2) of one tile row of tiles, in columns [first, first + kChunk):
// levels [kChunk, kLanes], row r in lane r.
inline void decode_levels(const LowBitWeight& weight, int row_tile, int first, float* levels) {
  constexpr int kTileLanes = 32, kBlock = 32, kPairs = 4;
  const int bits = weight.bits;
  const int64_t tile = int64_t{row_tile} * tile_columns(weight) + first / kTileColumns;
  const uint8_t* bytes = weight.qweight + tile * tile_bytes(weight);
  const uint32_t mask = (1u << bits) - 1;
  const float zero = 0.5f * static_cast<float>(weight.zero);
  for (int block = first % kTileColumns / kBlock; block < (first % kTileColumns + kChunk) / kBlock;
       ++block) {
    for (int lane = 0; lane < kTileLanes; ++lane) {
      const int column = (block * kBlock + lane % 4 * 2) % kChunk;
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        for (int pair = 0; pair < kPairs; ++pair) {
          int chunk = block, word = 2 * half + pair / 2, shift = 16 * (pair % 2), step = 8;
          if (bits == 4) {
            chunk = block / 2, word = 2 * (block % 2) + half, shift = 4 * pair, step = 16;
          } else if (bits == 2) {
            chunk = 0, word = 2 * (block / 2) + half, step = 16;
            shift = 2 * (4 * (block % 2) + pair);
          }
          uint32_t codes;
          std::memcpy(&codes, bytes + ((chunk * kTileLanes + lane) * 4 + word) * 4, sizeof codes);
          for (int element = 0; element < 2; ++element) {
            levels[(column + 8 * pair + element) * kLanes + row] =
                static_cast<float>(codes >> (shift + element * step) & mask) - zero;
          }
        }
      }
    }
  }
}

// The scales of one tile row of tiles for the group that holds column `column`, row r in lane r.
inline void read_scales(const LowBitWeight& weight, int row_tile, int column, float* scales) {
  const int groups = weight.in_features / weight.group;
  const uint16_t* pairs =
      weight.scales + (int64_t{row_tile} * groups + column / weight.group) * kTileRows;
  for (int row = 0; row < kTileRows; ++row) {
    scales[row] = widen(BFloat16{pairs[row % 8 * 2 + row / 8]});
  }
}

// x H for one block, in place: H is Sylvester's matrix over sqrt(block), its own inverse.
inline void hadamard(float* x, int block) {
  for (int step = 1; step < block; step *= 2) {
    for (int i = 0; i < block; ++i) {
      if (i & step) continue;
      const float a = x[i], b = x[i + step];
      x[i] = a + b;
      x[i + step] = a - b;
    }
  }
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  for (int i = 0; i < block; ++i) x[i] *= norm;
}

}  // namespace
}  // namespace minicpm41::cpu
