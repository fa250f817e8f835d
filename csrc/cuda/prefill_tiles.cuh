// How the prefill kernels cut a call into tiles of neighbouring rows.
#pragma once

#include "prefill.h"

namespace minicpm41 {
namespace cuda {

// While a list is being made, its last entry is this. Attention may begin on a tile as soon as the
// lists of its rows are there, before select_blocks has ended: each thread block of select_blocks
// lets the next launch begin only when all of its lists say so, and stays until they are made.
constexpr int32_t kNotListed = -2;

__device__ __forceinline__ void publish_list(int32_t* last_entry, int32_t block) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(last_entry), "r"(block) : "memory");
}
__device__ __forceinline__ void await_list(const int32_t* last_entry) {
  int32_t block;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(block) : "l"(last_entry) : "memory");
  } while (block == kNotListed);
}

// Neighbouring rows of one request. Where a tile is cut does not show in a row's bits: blocks that
// only its neighbours list leave no trace in its sums.
struct Tile {
  int request;
  int row;  // its first
  int rows;
  int position;  // of its first row
};

// How a call is cut: into tiles of up to rows[0] rows, and of its first ones, from begin[1] to
// begin[0], into tiles of up to rows[1], before that of up to rows[2]; no tile spans requests.
struct Cut {
  static constexpr int kSizes = 3;
  int rows[kSizes];
  int begin[kSizes];
  int tiles[kSizes];  // for each kv head
  // All tiles are of one size, there are more than thread blocks, and those that come last, of the
  // first rows, take about as long as the others.
  bool is_even;
};

__host__ __device__ inline int tiles_for(int rows, int tile_rows) {
  return (rows + tile_rows - 1) / tile_rows;
}
// Blocks from which on tiles take about as long each, since sparse rows list the same number.
__host__ __device__ inline int long_tile(int dense_len) {
  return dense_len > kBlockSize ? dense_len / kBlockSize : 1;
}
// No call of these shapes has more tiles of that size.
inline int64_t most_tiles(const Batch& batch, int tile_rows) {
  return tiles_for(batch.num_tokens, tile_rows) + int64_t{batch.batch_size};
}

// Rows that a prefill request has in this call, which may be a window of a longer step:
// cu_seqlens_q may begin below 0 and end past num_tokens.
__device__ __forceinline__ int rows_of(const Batch& batch, int request, int* first_row) {
  *first_row = 0;
  if (request >= batch.batch_size) return 0;
  const int query_len = __ldg(batch.query_lens + request);
  if (!is_prefill(query_len)) return 0;
  const int begin = __ldg(batch.cu_seqlens_q + request);
  *first_row = max(begin, 0);
  return max(min(begin + query_len, batch.num_tokens) - *first_row, 0);
}

__device__ __forceinline__ int running_sum(int value, int lane) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

// 32 requests at a time, one a lane: their rows, and which of them are in tiles of a size.
struct RequestScan {
  int first = -kWarpSize;  // request of lane 0
  int row, rows;

  __device__ __forceinline__ bool next(const Batch& batch, int lane) {
    first += kWarpSize;
    if (first >= batch.batch_size) return false;
    rows = rows_of(batch, first + lane, &row);
    const int end = running_sum(rows, lane) + rows_before_all_;
    rows_before_ = end - rows;
    rows_before_all_ = __shfl_sync(kAllLanes, end, kWarpSize - 1);
    return true;
  }
  __device__ __forceinline__ int begin_of(const Cut& cut, int size) const {
    return min(max(cut.begin[size] - rows_before_, 0), rows);
  }
  __device__ __forceinline__ int end_of(const Cut& cut, int size) const {
    return size == 0 ? rows : begin_of(cut, size - 1);
  }

 private:
  int rows_before_, rows_before_all_ = 0;
};

__device__ __forceinline__ int count_tiles(const Batch& batch, const Cut& cut, int size, int lane) {
  int tiles = 0;
  for (RequestScan scan; scan.next(batch, lane);) {
    const int rows = scan.end_of(cut, size) - scan.begin_of(cut, size);
    tiles += __reduce_add_sync(kAllLanes, tiles_for(rows, cut.rows[size]));
  }
  return tiles;
}

// Tile `index` of those of a size, of which there are more than that.
__device__ __forceinline__ Tile find_tile(const Batch& batch, const Cut& cut, int size, int index,
                                          int lane) {
  const int tile_rows = cut.rows[size];
  RequestScan scan;
  while (scan.next(batch, lane)) {
    const int begin = scan.begin_of(cut, size);
    const int end = scan.end_of(cut, size);
    const int tiles = tiles_for(end - begin, tile_rows);
    const int tiles_end = running_sum(tiles, lane);
    const unsigned holds = __ballot_sync(kAllLanes, index < tiles_end);
    if (holds == 0) {
      index -= __shfl_sync(kAllLanes, tiles_end, kWarpSize - 1);
      continue;
    }
    const int owner = __ffs(holds) - 1;
    const int at = begin + (index - (tiles_end - tiles)) * tile_rows;  // the owner's is right
    Tile tile;
    tile.request = scan.first + owner;
    tile.row = __shfl_sync(kAllLanes, scan.row + at, owner);
    tile.rows = __shfl_sync(kAllLanes, min(tile_rows, end - at), owner);
    tile.position = __ldg(batch.history_lens + tile.request) + tile.row -
                    __ldg(batch.cu_seqlens_q + tile.request);
    return tile;
  }
  return {};
}

// Cuts a call into tiles of `large` rows. If they are worked through by thread blocks that each
// take their share, what is left for the last round goes to all of them in smaller tiles, of one
// multiple of `step` rows or the next. Not so if the tiles are even, which is asked where all of
// `long_blocks` blocks or more count as equally long, and not where that is 0. Called by whole
// warps, as is find_tile.
__device__ __forceinline__ Cut cut_call(const Batch& batch, int large, int step, int kv_heads,
                                        int thread_blocks, int long_blocks, int lane) {
  Cut cut = {{large, large, large}, {0, 0, 0}, {0, 0, 0}, false};
  cut.tiles[0] = count_tiles(batch, cut, 0, lane);
  if (long_blocks > 0 && cut.tiles[0] * kv_heads > thread_blocks) {
    const auto blocks_of = [&](int index) {
      const Tile tile = find_tile(batch, cut, 0, index, lane);
      return min((tile.position + tile.rows - 1) / kBlockSize + 1, long_blocks);
    };
    cut.is_even = 2 * blocks_of(0) >= blocks_of(cut.tiles[0] - 1);
    if (cut.is_even) return cut;
  }
  const int left = tiles_for(cut.tiles[0] * kv_heads % thread_blocks, kv_heads) * large;  // rows
  const int shares = thread_blocks / kv_heads;
  if (left == 0 || shares == 0) return cut;
  int most = step;
  while (most < large && shares * most < left) most += step;
  const int less = max(most - step, step);
  // So many shares are of `less` rows, the others of `most`.
  const int less_rows = most == less ? 0 : (shares * most - left) / step * less;
  if (most < large) {
    cut.rows[1] = most;
    cut.rows[2] = less;
    cut.begin[0] = left;
    cut.begin[1] = less_rows;
  } else {
    cut.rows[1] = less;
    cut.begin[0] = less_rows;
  }
#pragma unroll
  for (int size = 0; size < Cut::kSizes; ++size) {
    cut.tiles[size] = count_tiles(batch, cut, size, lane);
  }
  return cut;
}

}  // namespace cuda
}  // namespace minicpm41
