// sparse_decode on Hopper: attention of each row over its listed blocks, or over all of them below
// dense_len.
//
// The blocks of a row are two runs: those known before its list is there, which are attended to
// while select_blocks still makes the list, and the rest. A run is cut into 16 lanes by its length
// alone, a lane into chunks of up to 4 blocks. Chunks are merged into their lane, four lanes into a
// group, groups into the row, the known run before the rest, always in this order. A cluster of 1
// to 16 thread blocks shares a row: how many depends on the launch, but since each takes whole
// lanes and no merge changes its order, the bits of a row do not.
//
// In a thread block two warps look up pages and have the copy engine bring them through a ring of
// 16 KiB tiles, the K pages of a chunk, then its V pages, then the next. Eight warps compute: each
// scores 8 keys of every page, they agree on one maximum for the chunk, write the weights to shared
// memory, and each multiplies them with 16 dimensions of V.
#include "decode_attention.cuh"
#include "hopper.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr int kLoaders = 2;  // warps that bring tiles, in turn
constexpr int kAllThreads = kThreads + kLoaders * kWarpSize;
constexpr int kChunkBlocks = 4;
// Padded by one ldmatrix row, so that eight rows fall into different banks.
constexpr int kWeightStride = kChunkBlocks * kBlockSize + kChunkBytes / 2;
constexpr int kMaxStages = 12;
constexpr int kMinStages = kChunkBlocks + 1;
static_assert(kGroupSize == 1 << 4, "see heads_log2");

// What thread blocks that share a row send to the one that merges `heads` of its heads: a lane each
// where 8 or 16 share it, else a group of lanes each.
struct Parts {
  int outs, stats;  // offsets in floats: [count, heads, kHeadDim], [count, heads] maxima and sums
  int heads;
  int floats;
  __host__ __device__ explicit Parts(int splits) : heads(kGroupSize / splits) {
    const int count = splits > kGroupLanes ? kLanes : kLanes / kGroupLanes;
    outs = 0;
    stats = count * heads * kHeadDim;
    floats = splits == 1 ? 0 : stats + 2 * count * heads;
  }
};

// The shared memory in the order it is laid out, in bytes after the ring.
struct Layout {
  int weights, warp_peaks, warp_sums, received, ids, bytes;
  __host__ __device__ Layout(int splits, int budget) {
    constexpr int kFloat = sizeof(float);
    weights = kGroupSize * kQStride;
    warp_peaks = weights + kGroupSize * kWeightStride * 2;
    warp_sums = warp_peaks + kGroupSize * kWarps * kFloat;
    received = warp_sums + kGroupSize * kWarps * kFloat;
    ids = received + 2 * Parts(splits).floats * kFloat;
    bytes = ids + budget * static_cast<int>(sizeof(int32_t)) + kAlignment;
  }
  static constexpr int kAlignment = 1024;  // of the ring, which starts somewhere before
};

#ifdef MINICPM41_HAS_WGMMA

constexpr int kHalfBytes = kTileBytes / 2;  // a tile is its first 64 dimensions, then the others
constexpr int kComputeBarrier = 1;

// Four dimensions of one head: what a thread merges of the parts that a block is sent.
constexpr int kValueDims = 4;
struct Values {
  float peak, sum;
  float4 out;
};
constexpr Values kNothing = {-INFINITY, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
__device__ __forceinline__ void merge(Values& into, const Values& from) {
  const Weights w = merge_weights(into.peak, from.peak);
  into.peak = w.peak;
  into.sum = merged(w, into.sum, from.sum);
  into.out.x = merged(w, into.out.x, from.out.x);
  into.out.y = merged(w, into.out.y, from.out.y);
  into.out.z = merged(w, into.out.z, from.out.z);
  into.out.w = merged(w, into.out.w, from.out.w);
}
static_assert(kGroupSize / 2 * kHeadDim == kThreads * kValueDims, "of two blocks that share a row");

// Blocks of a run before lane `lane`. A chunk of one block costs nearly as much as one of two: the
// lanes of a short run hold two each, or none.
__device__ __forceinline__ int lane_begin(int num_blocks, int lane) {
  if (num_blocks >= 2 * kLanes) return num_blocks * lane / kLanes;
  return min((num_blocks + 1) / 2 * lane / kLanes * 2, num_blocks);
}

// The blocks [first, first + count) of a row are known before its list is. Of a sparse row this is
// a guess that the list confirms: that it names every block while the budget lasts, and later at
// least the newest third of its budget, as every list of select_blocks does that is made with local
// blocks enough. A list that does not costs time: what was done ahead is dropped.
struct KnownRun {
  int first, count;
  __device__ __forceinline__ KnownRun(int own, bool is_dense, int budget) {
    count = is_dense || own < budget ? own + 1 : budget / 3;
    first = own + 1 - count;
  }
};

// What the list says about the rest.
struct ListedRun {
  int count;
  bool has_known;  // the known blocks are listed, and are not among these
  bool has_own;    // the last one is the row's own block
};

// Merges the parts of the values from `i` = head * kHeadDim + dimension on into `total`.
template <int kCount>
__device__ __forceinline__ void merge_parts(Values& total, const float* received,
                                            const Parts& parts, int i) {
  constexpr int kInner = kCount == kLanes ? kGroupLanes : 1;
#pragma unroll
  for (int p = 0; p < kCount; p += kInner) {
    Values group = kNothing;
#pragma unroll
    for (int j = p; j < p + kInner; ++j) {
      const float2 stats = *reinterpret_cast<const float2*>(received + parts.stats +
                                                            2 * (j * parts.heads + i / kHeadDim));
      merge(group, {stats.x, stats.y,
                    *reinterpret_cast<const float4*>(received + parts.outs +
                                                     j * parts.heads * kHeadDim + i)});
    }
    merge(total, group);
  }
}

// Position in the ring, and the parity of the turn it is in.
struct RingCursor {
  int stage = 0;
  int parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kAllThreads, 1)
    sparse_decode_sm90_kernel(const __grid_constant__ SparseAttentionParams params,
                              const __grid_constant__ CUtensorMap k_map,
                              const __grid_constant__ CUtensorMap v_map, const int splits,
                              const int stages, const bool by_request) {
  extern __shared__ unsigned char unaligned[];
  __shared__ uint64_t is_full[kMaxStages];
  __shared__ uint64_t is_empty[kMaxStages];
  __shared__ uint64_t is_listed;
  __shared__ uint64_t has_parts[2];  // of the known run, of the rest
  __shared__ ListedRun listed_run;
  unsigned char* ring = unaligned + (-shared_address(unaligned) & (Layout::kAlignment - 1));
  const Layout layout(splits, params.budget);
  unsigned char* shared = ring + stages * kTileBytes;
  unsigned char* q_tile = shared;
  T* weights = reinterpret_cast<T*>(shared + layout.weights);
  float* warp_peaks = reinterpret_cast<float*>(shared + layout.warp_peaks);
  float* warp_sums = reinterpret_cast<float*>(shared + layout.warp_sums);
  float* received = reinterpret_cast<float*>(shared + layout.received);
  int32_t* ids = reinterpret_cast<int32_t*>(shared + layout.ids);

  const int splits_log2 = __ffs(splits) - 1;  // splits are powers of two
  const int rank = blockIdx.x & (splits - 1);
  const int token = token_of_row(params.batch, blockIdx.x >> splits_log2, by_request);
  const int kv_head = blockIdx.y;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;

  static_assert(kGroupSize * kRowChunks == kThreads, "a thread copies one chunk of q");
  if (token >= 0) {
    // On their way while the row is looked up: its queries, and the table that it most likely has.
    if (thread < kThreads) {
      copy_chunk(shared_address(q_tile) + thread / kRowChunks * kQStride +
                     thread % kRowChunks * kChunkBytes,
                 static_cast<const T*>(params.q) + token * params.q_stride +
                     kv_head * kGroupSize * kHeadDim + thread * 8,
                 true);
    } else {
      touch_table(params.batch.block_tables +
                      int64_t{min(token, params.batch.batch_size - 1)} * params.batch.max_blocks,
                  params.batch.max_blocks, thread - kThreads, kLoaders * kWarpSize);
    }
    commit_copies();
  }
  const Parts parts(splits);
  if (thread == 0) {
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      init_barrier(is_full + i, 1);
      init_barrier(is_empty + i, kWarps);
    }
    // Whoever wrote the list arrives, not one for all: racecheck follows no other order.
    init_barrier(&is_listed, kWarpSize);
    for (int run = 0; run < 2; ++run) {
      init_barrier(has_parts + run, 1);
      arrive_expecting(has_parts + run, parts.floats * static_cast<int>(sizeof(float)));
    }
    publish_barriers();
  }
  __syncwarp();
  if (splits > 1) cluster_arrive();
  if (thread == kThreads) {
    prefetch_map(&k_map);
    prefetch_map(&v_map);
  }

  QueryRow row;
  const bool is_row = token >= 0 && load_query_row(params.batch, token, &row);
  wait_copies<0>();
  if (!is_row || is_prefill(row.query_len)) {
    if (!is_row && token >= 0 && rank == 0) write_padding<T>(params, token, kv_head);
    if (splits > 1) cluster_wait();
    wait_without_row(by_request);
    return;
  }
  const int own = row.position / kBlockSize;
  __syncthreads();
  // Every block's barriers are ready for parts. All warps wait here: racecheck hangs where only
  // some of a block's warps do.
  if (splits > 1) cluster_wait();

  const bool is_dense = row.position + 1 < params.dense_len;
  const KnownRun known(own, is_dense, params.budget);
  const int lanes_each = kLanes >> splits_log2;
  const int first_lane = lanes_each * rank;
  RingCursor cursor;

  if (warp >= kWarps) {
    const int loader = warp - kWarps;
    const auto load_run = [&](int num_blocks, const auto& block_of) {
      int end = lane_begin(num_blocks, first_lane);
      int looked_up = end;  // pages before this one, the last 32 of them in the lanes
      int page = 0;
#pragma unroll 1
      for (int list_lane = first_lane; list_lane < first_lane + lanes_each; ++list_lane) {
        const int lane_end = lane_begin(num_blocks, list_lane + 1);
#pragma unroll 1
        while (end < lane_end) {
          const int begin = end;
          end = min(begin + kChunkBlocks, lane_end);
          if (end > looked_up) {
            looked_up = begin + kWarpSize;
            if (begin + lane < num_blocks) page = __ldg(row.pages + block_of(begin + lane));
          }
          const int count = end - begin;
#pragma unroll 1
          for (int i = 0; i < 2 * count; ++i) {
            const bool is_v = i >= count;
            const int at = begin + (is_v ? i - count : i);
            const int source = __shfl_sync(kAllLanes, page, at - (looked_up - kWarpSize));
            if (i % kLoaders == loader) wait_phase(is_empty + cursor.stage, cursor.parity ^ 1);
            if (i % kLoaders == loader && lane == 0) {
              arrive_expecting(is_full + cursor.stage, kTileBytes);
              copy_page_once(is_v ? &v_map : &k_map, ring + cursor.stage * kTileBytes,
                             is_full + cursor.stage,
                             (source * params.heads.num_kv_heads + kv_head) * kBlockSize);
            }
            cursor.advance(stages);
          }
        }
      }
    };
    load_run(known.count, [&](int i) { return known.first + i; });
    // Of few candidates the list will name most: they come to L2 while it is made.
    const int candidates = known.first;
    if (splits == kLanes && loader == 1 && candidates <= 2 * (params.budget - known.count)) {
      const int at = (candidates * rank >> splits_log2) + lane;
      const bool is_mine = at < candidates * (rank + 1) >> splits_log2;
      const int page = is_mine ? __ldg(row.pages + at) : -1;
      if (page >= 0) {
        const int64_t tile = (int64_t{page} * params.heads.num_kv_heads + kv_head) * kTileBytes;
        fetch_to_l2(static_cast<const char*>(params.k_cache) + tile, kTileBytes);
        fetch_to_l2(static_cast<const char*>(params.v_cache) + tile, kTileBytes);
      }
    }
    // The compress_keys of the next step may start, and wait for this one's end, once all tiles are
    // on their way: earlier it would take multiprocessors from blocks that are still to come.
    if (is_dense) allow_next_launch();
    if (loader == 0) wait_for_previous_launch();
    if (!is_dense) {
      if (loader == 0) {
        const int32_t* list =
            params.topk_idx + (int64_t{kv_head} * params.batch.num_tokens + token) * params.budget;
        int listed = 0;
        constexpr int kBatch = 4;  // of loads that do not wait for each other
#pragma unroll 1
        for (int base = 0; base < params.budget; base += kBatch * kWarpSize) {
          int id[kBatch];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const int i = base + j * kWarpSize + lane;
            id[j] = i < params.budget ? __ldcg(list + i) : -1;
          }
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const int i = base + j * kWarpSize + lane;
            if (i < params.budget) ids[i] = id[j];
            listed += __popc(__ballot_sync(kAllLanes, id[j] >= 0));
          }
        }
        __syncwarp();
        // The list ascends to the row's own block at most: one entry vouches for all after it.
        ListedRun run;
        run.has_known =
            listed >= known.count && (known.count == 0 || ids[listed - known.count] == known.first);
        run.count = run.has_known ? listed - known.count : listed;
        run.has_own = run.count > 0 && ids[run.count - 1] == own;
        if (lane == 0) listed_run = run;
        arrive(&is_listed);
      }
      wait_phase(&is_listed, 0);
      load_run(listed_run.count, [&](int i) { return ids[i]; });
      allow_next_launch();
    }
    return;
  }

  const int head = lane / 4;        // and + 8
  const int column = lane % 4 * 2;  // and + 1
  const uint32_t ring_address = shared_address(ring);
  const uint32_t q_address =
      shared_address(q_tile) + lane % 16 * kQStride + lane / 16 * kChunkBytes;
  const uint32_t weights_address =
      shared_address(weights) + (lane % 16 * kWeightStride + lane / 16 * 8) * 2;
  // The copy engine swizzles: chunk c of row r of half a tile lies at c ^ (r % 8).
  constexpr int kHalfRow = kRowBytes / 2;
  const uint32_t key_offset =
      (warp * kWarpKeys + lane % 8) * kHalfRow + (lane / 8 ^ lane % 8) * kChunkBytes;
  const uint32_t value_offset = warp / 4 * kHalfBytes + lane % 16 * kHalfRow +
                                ((warp % 4 * 2 + lane / 16) ^ lane % 8) * kChunkBytes;
  const int last_key = row.position % kBlockSize;  // in the block `own`
  const float scale_log2 = params.softmax_scale * kLog2e;
  // The next two tiles, or one twice, once they have landed; advances the cursor past them.
  const auto wait_pair = [&](bool has_two, int (&stage)[2]) {
    stage[0] = cursor.stage;
    wait_phase(is_full + cursor.stage, cursor.parity);
    cursor.advance(stages);
    stage[1] = stage[0];
    if (has_two) {
      stage[1] = cursor.stage;
      wait_phase(is_full + cursor.stage, cursor.parity);
      cursor.advance(stages);
    }
  };
  const auto release_pair = [&](bool has_two, const int (&stage)[2]) {
    __syncwarp();
    if (lane == 0) {
      arrive(is_empty + stage[0]);
      if (has_two) arrive(is_empty + stage[1]);
    }
  };

  uint32_t q[kKSteps][4];
#pragma unroll
  for (int step = 0; step < kKSteps; ++step)
    ldmatrix_x4(q[step], q_address + step * 2 * kChunkBytes);

  // The row so far: of one block that has it alone, else the values that this thread merges.
  Partial whole;
  Values total;
  const bool merges = splits > 1 && thread < parts.heads * kHeadDim / kValueDims;
  ListedRun run = {known.count, false, known.count > 0};
#pragma unroll 1
  for (int number = 0;; ++number) {
    int end = lane_begin(run.count, first_lane);
    Partial group;
    group.clear();
    if (!run.has_known) {
      whole.clear();
      total = kNothing;
    }
#pragma unroll 1
    for (int list_lane = first_lane; list_lane < first_lane + lanes_each; ++list_lane) {
      Partial lane_part;
      lane_part.clear();
      const int lane_end = lane_begin(run.count, list_lane + 1);
      const int lane_first = end;
#pragma unroll 1
      while (end < lane_end) {
        const int begin = end;
        end = min(begin + kChunkBlocks, lane_end);
        const int count = end - begin;
        const bool has_own = run.has_own && end == run.count;

        float scores[kChunkBlocks][4];
#pragma unroll
        for (int page = 0; page < kChunkBlocks; ++page) {
#pragma unroll
          for (int c = 0; c < 4; ++c) scores[page][c] = -INFINITY;
        }
#pragma unroll
        for (int page = 0; page < kChunkBlocks; page += 2) {
          if (page >= count) break;
          const bool has_two = page + 1 < count;
          int stage[2];
          wait_pair(has_two, stage);
          float even[2][4] = {};
          float odd[2][4] = {};
#pragma unroll
          for (int two = 0; two < kKSteps / 2; ++two) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              uint32_t keys[4];
              ldmatrix_x4(keys, ring_address + stage[j] * kTileBytes + two / 2 * kHalfBytes +
                                    (key_offset ^ (two % 2 * 4 * kChunkBytes)));
              mma_16x8x16<T>(even[j], q[2 * two], keys[0], keys[1]);
              mma_16x8x16<T>(odd[j], q[2 * two + 1], keys[2], keys[3]);
            }
          }
          release_pair(has_two, stage);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const int key = warp * kWarpKeys + column + c % 2;
              const bool is_own = has_own && page + j + 1 == count;
              const bool is_seen = page + j < count && (!is_own || key <= last_key);
              scores[page + j][c] = is_seen ? even[j][c] + odd[j][c] : -INFINITY;
            }
          }
        }

        Partial chunk;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float peak = -INFINITY;
#pragma unroll
          for (int i = 0; i < kChunkBlocks; ++i) {
            peak = fmaxf(peak, fmaxf(scores[i][2 * r], scores[i][2 * r + 1]));
          }
          peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 1));
          peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 2));
          if (lane % 4 == 0) warp_peaks[(head + 8 * r) * kWarps + warp] = peak;
        }
        sync_named(kComputeBarrier, kThreads);

#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float4* peaks =
              reinterpret_cast<const float4*>(warp_peaks + (head + 8 * r) * kWarps);
          const float4 a = peaks[0], b = peaks[1];
          chunk.peak[r] = scale_log2 * fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)),
                                             fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
          const float base = chunk.peak[r] == -INFINITY ? 0.0f : chunk.peak[r];
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < kChunkBlocks; ++i) {
            if (i == 2 && count <= 2) break;
            // Of a block that is not there: weights of 0.
            const float x = exp2_approx(__fmaf_rn(scores[i][2 * r], scale_log2, -base));
            const float y = exp2_approx(__fmaf_rn(scores[i][2 * r + 1], scale_log2, -base));
            store_pair(weights + (head + 8 * r) * kWeightStride + i * kBlockSize +
                           warp * kWarpKeys + column,
                       x, y);
            sum += x + y;
          }
          sum += __shfl_xor_sync(kAllLanes, sum, 1);
          sum += __shfl_xor_sync(kAllLanes, sum, 2);
          if (lane % 4 == 0) warp_sums[(head + 8 * r) * kWarps + warp] = sum;
        }
        if (has_own && last_key + 1 < kBlockSize) {
          // Weights of 0 do not silence what lies behind the last key: it may be NaN.
          RingCursor of_own = cursor;
          for (int i = 0; i + 1 < count; ++i) of_own.advance(stages);
          wait_phase(is_full + of_own.stage, of_own.parity);
          for (int i = (last_key + 1) * kRowChunks / 2 + thread; i < kBlockSize * kRowChunks / 2;
               i += kThreads) {
            for (int half = 0; half < 2; ++half) {
              *reinterpret_cast<uint4*>(ring + of_own.stage * kTileBytes + half * kHalfBytes +
                                        i * kChunkBytes) = make_uint4(0, 0, 0, 0);
            }
          }
          publish_writes();
        }
        sync_named(kComputeBarrier, kThreads);

        float odd[2][4] = {};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) chunk.out[n][c] = 0.0f;
        }
#pragma unroll
        for (int page = 0; page < kChunkBlocks; page += 2) {
          if (page >= count) break;
          const bool has_two = page + 1 < count;
          int stage[2];
          wait_pair(has_two, stage);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int step = 0; step < kBlockSize / 16; ++step) {
              uint32_t w[4], values[4];
              ldmatrix_x4(w, weights_address + ((page + j) * kBlockSize + step * 16) * 2);
              ldmatrix_x4_trans(values, ring_address + stage[j] * kTileBytes + value_offset +
                                            step * 16 * kHalfRow);
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                mma_16x8x16<T>(step % 2 ? odd[n] : chunk.out[n], w, values[2 * n],
                               values[2 * n + 1]);
              }
            }
          }
          release_pair(has_two, stage);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) chunk.out[n][c] += odd[n][c];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float4* sums = reinterpret_cast<const float4*>(warp_sums + (head + 8 * r) * kWarps);
          const float4 a = sums[0], b = sums[1];
          chunk.sum[r] = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
        }
        if (begin == lane_first) {
          lane_part = chunk;
        } else {
          merge(lane_part, chunk);
        }
      }

      if (splits > kGroupLanes || list_lane % kGroupLanes == 0) {
        group = lane_part;
      } else {
        merge(group, lane_part);
      }
      if (splits <= kGroupLanes && list_lane % kGroupLanes != kGroupLanes - 1) continue;
      if (splits == 1) {
        merge(whole, group);
      } else {
        const int slot = splits > kGroupLanes ? list_lane : list_lane / kGroupLanes;
        const int heads_log2 = 4 - splits_log2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int mine = head + 8 * r;
          const int target = mine >> heads_log2;
          const uint32_t barrier = address_in_block(has_parts + number, target);
          const uint32_t memory = address_in_block(received + number * parts.floats, target);
          const int row_of_head = (slot << heads_log2) + (mine & (parts.heads - 1));
          constexpr uint32_t kFloat = sizeof(float);
          // Lanes swap pairs, so that each sends four dimensions that follow each other.
          const bool is_odd = lane % 2 != 0;
          const float x = is_odd ? group.out[1][2 * r] : group.out[0][2 * r];
          const float y = is_odd ? group.out[1][2 * r + 1] : group.out[0][2 * r + 1];
          const float other_x =
              __shfl_xor_sync(kAllLanes, is_odd ? group.out[0][2 * r] : group.out[1][2 * r], 1);
          const float other_y = __shfl_xor_sync(
              kAllLanes, is_odd ? group.out[0][2 * r + 1] : group.out[1][2 * r + 1], 1);
          const float4 four =
              is_odd ? make_float4(other_x, other_y, x, y) : make_float4(x, y, other_x, other_y);
          const int dim = warp * kWarpDims + lane % 2 * 8 + lane / 2 % 2 * 4;
          send(memory + (row_of_head * kHeadDim + dim) * kFloat, barrier, four);
          if (warp == 0 && lane % 4 == 0) {
            send(memory + (parts.stats + 2 * row_of_head) * kFloat, barrier, group.peak[r],
                 group.sum[r]);
          }
        }
      }
      group.clear();
    }

    if (splits > 1) {
      wait_phase(has_parts + number, 0);
      const float* parts_of_run = received + number * parts.floats;
      if (merges && splits > kGroupLanes) {
        merge_parts<kLanes>(total, parts_of_run, parts, thread * kValueDims);
      } else if (merges) {
        merge_parts<kLanes / kGroupLanes>(total, parts_of_run, parts, thread * kValueDims);
      }
    }
    if (is_dense || number == 1) break;
    wait_phase(&is_listed, 0);
    run = listed_run;
    if (run.count == 0 && run.has_known) break;
  }

  T* out =
      static_cast<T*>(params.out) + token * params.out_stride + kv_head * kGroupSize * kHeadDim;
  float* lse = params.lse == nullptr
                   ? nullptr
                   : params.lse + int64_t{token} * params.heads.num_q_heads + kv_head * kGroupSize;
  if (splits == 1) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = inverse(whole.sum[r]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        store_pair(out + (head + 8 * r) * kHeadDim + warp * kWarpDims + column + n * 8,
                   __fmul_rn(whole.out[n][2 * r], scale),
                   __fmul_rn(whole.out[n][2 * r + 1], scale));
      }
      if (lse != nullptr && warp == 0 && lane % 4 == 0) {
        lse[head + 8 * r] = natural_lse(whole.peak[r], whole.sum[r]);
      }
    }
  } else if (merges) {
    const int i = thread * kValueDims;
    const float scale = inverse(total.sum);
    *reinterpret_cast<uint2*>(out + rank * parts.heads * kHeadDim + i) =
        make_uint2(Pair<T>::pack(__fmul_rn(total.out.x, scale), __fmul_rn(total.out.y, scale)),
                   Pair<T>::pack(__fmul_rn(total.out.z, scale), __fmul_rn(total.out.w, scale)));
    if (lse != nullptr && i % kHeadDim == 0) {
      lse[rank * parts.heads + i / kHeadDim] = natural_lse(total.peak, total.sum);
    }
  }
}

#else

template <typename T>
__global__ void sparse_decode_sm90_kernel(const __grid_constant__ SparseAttentionParams,
                                          const __grid_constant__ CUtensorMap,
                                          const __grid_constant__ CUtensorMap, const int, const int,
                                          const bool) {}

#endif

// Of a launch whose rows go by request: nothing else visits the padding.
template <typename T>
__global__ void clear_padding_kernel(const __grid_constant__ SparseAttentionParams params) {
  allow_next_launch();
  const int first = blockIdx.x * kWarpSize;
  const int token = first + static_cast<int>(threadIdx.x) % kWarpSize;
  unsigned padding =
      __ballot_sync(kAllLanes, token < params.batch.num_tokens &&
                                   __ldg(params.batch.batch_id_per_token + token) < 0);
  for (; padding != 0; padding &= padding - 1) {
    for (int kv_head = 0; kv_head < params.heads.num_kv_heads; ++kv_head) {
      write_padding<T>(params, first + __ffs(padding) - 1, kv_head);
    }
  }
  wait_without_row(/*by_request=*/true);
}

template <typename T>
cudaError_t launch_decode(const SparseAttentionParams& params, const LaunchShape& shape, int stages,
                          bool by_request, const CUtensorMap (&maps)[2], void* stream) {
  const cudaError_t error = launch(sparse_decode_sm90_kernel<T>, shape, stream, params, maps[0],
                                   maps[1], shape.cluster, stages, by_request);
  if (error != cudaSuccess || !by_request) return error;
  LaunchShape clear;
  clear.grid = dim3((params.batch.num_tokens + kWarpSize - 1) / kWarpSize);
  clear.threads = kThreads;
  clear.overlap = true;
  return launch(clear_padding_kernel<T>, clear, stream, params);
}

}  // namespace

// Compiled for any other architecture the kernel is empty and has no shared memory of its own.
bool has_sparse_decode_sm90(const Device& device) {
  if (device.major != 9) return false;
  static const bool is_built = holds_kernel(sparse_decode_sm90_kernel<__nv_bfloat16>);
  return is_built;
}

Status sparse_decode_sm90(const SparseAttentionParams& params, const Device& device, void* stream) {
  const char* op = "sparse_attention";
  constexpr int kStaticBytes = 1024;
  CUtensorMap maps[2];
  for (int i = 0; i < 2; ++i) {
    Status status =
        encode_page_map(op, i == 0 ? params.k_cache : params.v_cache, params.batch.num_pages,
                        params.heads.num_kv_heads, params.heads.dtype, &maps[i]);
    if (!status.ok()) return status;
  }
  const DecodeRows row_grid(params.batch);
  const int64_t rows = int64_t{row_grid.count} * params.heads.num_kv_heads;
  const bool is_half = params.heads.dtype == kFloat16;
  const auto kernel =
      is_half ? sparse_decode_sm90_kernel<__half> : sparse_decode_sm90_kernel<__nv_bfloat16>;
  LaunchShape shape;
  shape.threads = kAllThreads;
  shape.overlap = params.overlap != 0;
  int stages = 0;
  int fits = 0;
  cudaError_t error = cudaSuccess;
  // Chooses the ring for clusters of that size, and sees how many run side by side.
  const auto choose = [&](int cluster) {
    // Where every multiprocessor works, deep rings let some run ahead of the others; in short rows
    // these have no time to catch up.
    const bool is_full = 2 * cluster * rows > device.multiprocessors;
    const int full_stages = kMinStages + (params.batch.max_blocks > 2 * kLanes);
    const int rest = Layout(cluster, params.budget).bytes + kStaticBytes;
    stages =
        std::min(is_full ? full_stages : kMaxStages, (device.shared_bytes - rest) / kTileBytes);
    shape.cluster = cluster;
    shape.shared_bytes = stages * kTileBytes + Layout(cluster, params.budget).bytes;
    if (stages >= kMinStages) {
      error = count_clusters(kernel, kAllThreads, shape.shared_bytes, cluster, &fits);
    }
    return stages >= kMinStages && error == cudaSuccess;
  };
  // The most blocks a row that run side by side; the bits of a row do not depend on it. A row that
  // is much longer than the others would hold them all up: then as many as there may be.
  const bool is_long = has_long_rows(params);
  int cluster = kLanes;
  while (choose(cluster) && (is_long ? fits == 0 : fits < rows) && cluster > 1) cluster /= 2;
  if (error != cudaSuccess) return launch_status(op, error);
  Check check(op);
  check.require(stages >= kMinStages, "budget", std::to_string(params.budget),
                "less: a list that long does not fit into the shared memory of this GPU");
  if (!check.ok()) return check.status();
  shape.grid = dim3(row_grid.count * shape.cluster, params.heads.num_kv_heads);
  const auto launch_with = is_half ? launch_decode<__half> : launch_decode<__nv_bfloat16>;
  return launch_status(op, launch_with(params, shape, stages, row_grid.by_request, maps, stream));
}

}  // namespace cuda
}  // namespace minicpm41
