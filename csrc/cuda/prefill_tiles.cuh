// How the prefill kernels cut a call into tiles of neighbouring rows.
#pragma once

#include "prefill.h"

namespace minicpm41 {
namespace cuda {

// Neighbouring rows of one request. Where a tile is cut does not show in a row's bits: blocks that
// only its neighbours list leave no trace in its sums.
struct Tile {
  int request;
  int row;  // its first
  int rows;
  int position;  // of its first row
};

// How a call is cut: its first `small_rows` rows into tiles of up to `small` rows, the others into
// tiles of up to `large`; no tile spans requests.
struct Cut {
  int large, small, small_rows;
  int large_tiles, small_tiles;  // for each kv head
};

__host__ __device__ inline int tiles_for(int rows, int tile_rows) {
  return (rows + tile_rows - 1) / tile_rows;
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

// 32 requests at a time, one a lane: their rows and how many of these are cut small.
struct RequestScan {
  int first = -kWarpSize;  // request of lane 0
  int row, rows, small_rows;

  __device__ __forceinline__ bool next(const Batch& batch, const Cut& cut, int lane) {
    first += kWarpSize;
    if (first >= batch.batch_size) return false;
    rows = rows_of(batch, first + lane, &row);
    const int end = running_sum(rows, lane) + rows_before_;
    small_rows = min(max(cut.small_rows - (end - rows), 0), rows);
    rows_before_ = __shfl_sync(kAllLanes, end, kWarpSize - 1);
    return true;
  }

 private:
  int rows_before_ = 0;
};

// Cuts a call into tiles of `large` rows. If they are worked through by thread blocks that each
// take their share, what is left for the last round goes to all of them in smaller tiles, a
// multiple of `step` rows each. Called by whole warps, as is find_tile.
__device__ __forceinline__ Cut cut_call(const Batch& batch, int large, int step, int kv_heads,
                                        int thread_blocks, int lane) {
  Cut cut = {large, large, 0, 0, 0};
  for (int pass = 0; pass < 2; ++pass) {
    int tiles = 0, small_tiles = 0;
    for (RequestScan scan; scan.next(batch, cut, lane);) {
      tiles += __reduce_add_sync(kAllLanes, tiles_for(scan.rows - scan.small_rows, large));
      small_tiles += __reduce_add_sync(kAllLanes, tiles_for(scan.small_rows, cut.small));
    }
    cut.large_tiles = tiles;
    cut.small_tiles = small_tiles;
    if (pass == 1) break;
    const int left = tiles * kv_heads % thread_blocks;
    int small = step;
    while (small < large && left * large > thread_blocks * small) small += step;
    if (left == 0 || small >= large) break;
    cut.small = small;
    cut.small_rows = tiles_for(left, kv_heads) * large;
  }
  return cut;
}

// Tile `index` of the large or the small ones, of which there are more than that.
__device__ __forceinline__ Tile find_tile(const Batch& batch, const Cut& cut, bool is_small,
                                          int index, int lane) {
  const int tile_rows = is_small ? cut.small : cut.large;
  RequestScan scan;
  while (scan.next(batch, cut, lane)) {
    const int begin = is_small ? 0 : scan.small_rows;
    const int end = is_small ? scan.small_rows : scan.rows;
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

}  // namespace cuda
}  // namespace minicpm41
