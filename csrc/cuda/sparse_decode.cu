// Attention of each row over its listed blocks, or over all of them below dense_len: the kernel for
// GPUs without a faster one (sparse_decode_sm90.cu).
//
// The list of a (token, kv head) is cut into 16 lanes by its length alone; a lane is worked through
// in chunks of up to 6 blocks, and chunks, lanes and groups of four lanes are merged in a fixed
// order. 1, 4 or 16 thread blocks share a list: how many depends on the launch, but since each
// takes whole groups or one lane, and no merge changes its order, the bits of a row do not.
//
// A chunk goes through a ring of 16 KiB tiles, first its K pages, then its V pages. Each of 8 warps
// scores 8 keys of every page, the warps agree on one maximum for the chunk, write the weights to
// shared memory, and each multiplies them with 16 dimensions of V.
#include "decode_attention.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr int kChunkBlocks = 6;
// Padded by one ldmatrix row, so that eight rows fall into different banks.
constexpr int kWeightStride = kChunkBlocks * kBlockSize + kChunkBytes / 2;
constexpr int kWeightBytes = kGroupSize * kWeightStride * 2;
constexpr int kPartFloats = kGroupSize * kHeadDim + 2 * kGroupSize;  // output, maxima and sums

// A thread's partial result in shared memory, for the one that is seldom needed: registers are
// short.
constexpr int kPartialFloats = sizeof(Partial) / sizeof(float);
constexpr int kSavedBytes = sizeof(Partial) * kThreads;
__device__ __forceinline__ void save(float* saved, const Partial& part) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    saved[(2 * r) * kThreads] = part.peak[r];
    saved[(2 * r + 1) * kThreads] = part.sum[r];
#pragma unroll
    for (int i = 0; i < 4; ++i) saved[(4 + 4 * r + i) * kThreads] = part.out[r][i];
  }
}
__device__ __forceinline__ Partial restore(const float* saved) {
  Partial part;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    part.peak[r] = saved[(2 * r) * kThreads];
    part.sum[r] = saved[(2 * r + 1) * kThreads];
#pragma unroll
    for (int i = 0; i < 4; ++i) part.out[r][i] = saved[(4 + 4 * r + i) * kThreads];
  }
  return part;
}
static_assert(kPartialFloats == 12, "save and restore name every float");

// Blocks of a list up to lane `lane`.
__device__ __forceinline__ int lane_begin(int num_blocks, int lane) {
  return num_blocks * lane / kLanes;
}

// Walks the tiles of lanes [lane, last_lane): for each chunk its K pages, then its V pages.
struct TileCursor {
  int num_blocks, lane, last_lane;
  int begin, end;  // of the chunk, indices into the list
  int at;
  bool is_v;

  __device__ __forceinline__ TileCursor(int blocks, int first, int last)
      : num_blocks(blocks), lane(first), last_lane(last), end(lane_begin(blocks, first)) {
    next_chunk();
  }
  __device__ __forceinline__ bool done() const { return lane == last_lane; }
  __device__ __forceinline__ void next_chunk() {
    begin = end;
    while (lane < last_lane && begin == lane_begin(num_blocks, lane + 1)) ++lane;
    if (!done()) end = min(begin + kChunkBlocks, lane_begin(num_blocks, lane + 1));
    at = begin;
    is_v = false;
  }
  __device__ __forceinline__ void next_tile() {
    if (++at < end) return;
    if (is_v) {
      next_chunk();
    } else {
      at = begin;
      is_v = true;
    }
  }
};

// One output value from the partial results of all lanes (kParts = 16) or groups (kParts = 4).
// parts[i * stride] is the value, peaks[i * head_stride] and sums[i * head_stride] are its head's.
template <int kParts, typename T>
__device__ __forceinline__ void combine(const SparseAttentionParams& params, int token, int q_head,
                                        int dim, const float* parts, const float* peaks,
                                        const float* sums, int stride, int head_stride) {
  float part_peaks[kParts], part_sums[kParts], part_outs[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    part_outs[i] = parts[i * stride];
    part_peaks[i] = peaks[i * head_stride];
    part_sums[i] = sums[i * head_stride];
  }
  constexpr int kInner = kParts == kLanes ? kGroupLanes : 1;
  float peak = -INFINITY, sum = 0.0f, out = 0.0f;
#pragma unroll
  for (int i = 0; i < kParts; i += kInner) {
    float group_peak = -INFINITY, group_sum = 0.0f, group_out = 0.0f;
#pragma unroll
    for (int j = i; j < i + kInner; ++j) {
      const Weights w = merge_weights(group_peak, part_peaks[j]);
      group_peak = w.peak;
      group_sum = merged(w, group_sum, part_sums[j]);
      group_out = merged(w, group_out, part_outs[j]);
    }
    const Weights w = merge_weights(peak, group_peak);
    peak = w.peak;
    sum = merged(w, sum, group_sum);
    out = merged(w, out, group_out);
  }
  T* target = static_cast<T*>(params.out) + token * params.out_stride + q_head * kHeadDim;
  const float value = __fmul_rn(out, inverse(sum));
  const float next = __shfl_down_sync(kAllLanes, value, 1);
  if (dim % 2 == 0) store_pair(target + dim, value, next);
  if (params.lse != nullptr && dim == 0) {
    params.lse[int64_t{token} * params.heads.num_q_heads + q_head] = natural_lse(peak, sum);
  }
}

int shared_bytes(int stages, int budget) {
  return stages * kTileBytes + kWeightBytes + kSavedBytes +
         2 * budget * static_cast<int>(sizeof(int32_t));
}

template <typename T, int kStages>
__global__ void __launch_bounds__(kThreads, 2)
    sparse_decode_kernel(const __grid_constant__ SparseAttentionParams params, const int splits) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(128) unsigned char q_tile[kGroupSize * kQStride];
  __shared__ float warp_peaks[kWarps][kGroupSize];
  __shared__ float warp_sums[kWarps][kGroupSize];
  unsigned char* ring = shared;
  T* weights = reinterpret_cast<T*>(shared + kStages * kTileBytes);
  float* merging = reinterpret_cast<float*>(shared + kStages * kTileBytes + kWeightBytes);
  int32_t* ids =
      reinterpret_cast<int32_t*>(shared + kStages * kTileBytes + kWeightBytes + kSavedBytes);
  int32_t* id_pages = ids + params.budget;

  const int splits_log2 = __ffs(splits) - 1;  // 1, 4 or 16
  const int rank = blockIdx.x & (splits - 1);
  const int token = blockIdx.x >> splits_log2;
  const int kv_head = blockIdx.y;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int head = lane / 4;        // and + 8
  const int column = lane % 4 * 2;  // and + 1

  QueryRow row;
  if (!load_query_row(params.batch, token, &row)) {
    if (rank == 0) write_padding<T>(params, token, kv_head);
    wait_for_previous_launch();
    return;
  }
  if (is_prefill(row.query_len)) {
    wait_for_previous_launch();
    return;
  }
  const int own = row.position / kBlockSize;
  touch_table(row.pages, own + 1, thread, kThreads);
  // The heads of the group in shared memory: in registers they would leave no room for the
  // partials.
  static_assert(kGroupSize * kRowChunks == kThreads, "a thread copies one chunk of q");
  *reinterpret_cast<uint4*>(q_tile + thread / kRowChunks * kQStride +
                            thread % kRowChunks * kChunkBytes) =
      *reinterpret_cast<const uint4*>(static_cast<const T*>(params.q) + token * params.q_stride +
                                      kv_head * kGroupSize * kHeadDim + thread * 8);

  const bool is_dense = row.position + 1 < params.dense_len;
  int num_blocks = own + 1;
  if (!is_dense) {
    wait_for_previous_launch();
    const int32_t* list =
        params.topk_idx + (int64_t{kv_head} * params.batch.num_tokens + token) * params.budget;
    num_blocks = 0;
    for (int base = 0; base < params.budget; base += kThreads) {
      const int i = base + thread;
      const int id = i < params.budget ? __ldcg(list + i) : -1;
      if (id >= 0) {
        ids[i] = id;
        id_pages[i] = row.pages[id];
      }
      num_blocks += __syncthreads_count(id >= 0);
    }
  }

  const int first_lane = kLanes / splits * rank;
  const int last_lane = kLanes / splits * (rank + 1);
  const int kv_heads = params.heads.num_kv_heads;
  const T* k_cache = static_cast<const T*>(params.k_cache);
  const T* v_cache = static_cast<const T*>(params.v_cache);
  const uint32_t ring_address = shared_address(ring);
  const uint32_t q_address =
      shared_address(q_tile) + lane % 16 * kQStride + lane / 16 * kChunkBytes;
  const uint32_t weights_address = shared_address(weights);
  // swizzled() of the first chunks of this lane's key; chunks 4..7 differ in one bit.
  const uint32_t key_offset = swizzled(warp * kWarpKeys + lane % 8, lane / 8);
  const int last_key = row.position % kBlockSize;  // in the block `own`

  // Every warp copies the 8 keys of a K page that it scores itself, and as many rows of a V page.
  TileCursor loading(num_blocks, first_lane, last_lane);
  int load_stage = 0;
  const auto load_tile = [&]() {
    if (!loading.done()) {
      const int at = loading.at;
      const int id = is_dense ? at : ids[at];
      const int page = is_dense ? row.pages[at] : id_pages[at];
      const T* tile =
          slot_row<kBlockSize>(loading.is_v ? v_cache : k_cache, page, kv_heads, kv_head, 0);
      const uint32_t stage = ring_address + load_stage * kTileBytes;
      const int chunk = lane % kRowChunks;
#pragma unroll
      for (int i = 0; i < kWarpKeys / 2; ++i) {
        const int key = warp * kWarpKeys + lane / kRowChunks + 2 * i;
        copy_chunk(stage + swizzled(key, chunk), tile + key * kHeadDim + chunk * 8,
                   id < own || key <= last_key);
      }
      loading.next_tile();
    }
    load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) load_tile();

  const float scale_log2 = params.softmax_scale * kLog2e;
  Partial lane_part, group;
  group.clear();
  if (splits == 1) save(merging + threadIdx.x, group);
  lane_part.clear();
  int read_stage = 0;
  int end = lane_begin(num_blocks, first_lane);
  for (int list_lane = first_lane; list_lane < last_lane; ++list_lane) {
    lane_part.clear();
    const int lane_end = lane_begin(num_blocks, list_lane + 1);
    while (end < lane_end) {
      const int begin = end;
      end = min(begin + kChunkBlocks, lane_end);
      const int count = end - begin;
      __syncthreads();  // the chunk before has read its weights and its last V page

      // The newest page's scores are the last; older ones move up. A loop that is not unrolled: its
      // instructions are fetched once.
      float scores[kChunkBlocks][4];
      float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        wait_copies<kStages - 2>();
        __syncwarp();
        load_tile();
        const uint32_t stage = ring_address + read_stage * kTileBytes;
        read_stage = read_stage + 1 == kStages ? 0 : read_stage + 1;
        float odd[4] = {};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int older = 0; older + 1 < kChunkBlocks; ++older) {
            scores[older][c] = scores[older + 1][c];
          }
          scores[kChunkBlocks - 1][c] = 0.0f;
        }
        float (&newest)[4] = scores[kChunkBlocks - 1];
#pragma unroll
        for (int k = 0; k < kKSteps / 2; ++k) {
          uint32_t keys[4];
          uint32_t q[4];
          ldmatrix_x4(keys, stage + (k % 2 == 0 ? key_offset : key_offset ^ (4 * kChunkBytes)) +
                                k / 2 * 8 * kChunkBytes);
          ldmatrix_x4(q, q_address + 2 * k * 2 * kChunkBytes);
          mma_16x8x16<T>(newest, q, keys[0], keys[1]);
          ldmatrix_x4(q, q_address + (2 * k + 1) * 2 * kChunkBytes);
          mma_16x8x16<T>(odd, q, keys[2], keys[3]);
        }
        const int id = is_dense ? begin + i : ids[begin + i];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int key = warp * kWarpKeys + column + c % 2;
          newest[c] = id < own || key <= last_key ? newest[c] + odd[c] : -INFINITY;
          peak[c / 2] = fmaxf(peak[c / 2], newest[c]);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAllLanes, peak[r], 1));
        peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAllLanes, peak[r], 2));
        if (lane % 4 == 0) warp_peaks[warp][head + 8 * r] = peak[r];
      }
      __syncthreads();

      Partial chunk;
      float sum[2] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) peak[r] = fmaxf(peak[r], warp_peaks[w][head + 8 * r]);
        chunk.peak[r] = peak[r] * scale_log2;
        const float base = peak[r] == -INFINITY ? 0.0f : chunk.peak[r];
#pragma unroll
        for (int i = 0; i < kChunkBlocks; ++i) {
          const int page = i - (kChunkBlocks - count);
          if (page >= 0) {
            const float x = exp2_approx(__fmaf_rn(scores[i][2 * r], scale_log2, -base));
            const float y = exp2_approx(__fmaf_rn(scores[i][2 * r + 1], scale_log2, -base));
            sum[r] += x + y;
            store_pair(weights + (head + 8 * r) * kWeightStride + page * kBlockSize +
                           warp * kWarpKeys + column,
                       x, y);
          }
        }
        sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
        sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
        if (lane % 4 == 0) warp_sums[warp][head + 8 * r] = sum[r];
      }

      float odd[2][4] = {};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) chunk.out[n][c] = 0.0f;
      }
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        wait_copies<kStages - 2>();
        __syncthreads();  // all rows of this V page have landed, the page before is read
        load_tile();
        const uint32_t stage = ring_address + read_stage * kTileBytes;
        read_stage = read_stage + 1 == kStages ? 0 : read_stage + 1;
#pragma unroll
        for (int step = 0; step < kBlockSize / 16; ++step) {
          uint32_t w[4];
          uint32_t values[4];
          ldmatrix_x4(w, weights_address + ((lane % 16) * kWeightStride + i * kBlockSize +
                                            step * 16 + lane / 16 * 8) *
                                               2);
          ldmatrix_x4_trans(values, stage + swizzled(step * 16 + lane % 16, warp * 2 + lane / 16));
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            mma_16x8x16<T>(step % 2 ? odd[n] : chunk.out[n], w, values[2 * n], values[2 * n + 1]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) chunk.out[n][c] += odd[n][c];
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        chunk.sum[r] = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) chunk.sum[r] += warp_sums[w][head + 8 * r];
      }
      merge(lane_part, chunk);
    }
    if (splits < kLanes) {
      merge(group, lane_part);
      if (list_lane % kGroupLanes == kGroupLanes - 1 && list_lane + 1 < last_lane) {
        Partial sum = restore(merging + threadIdx.x);
        merge(sum, group);
        save(merging + threadIdx.x, sum);
        group.clear();
      }
    }
  }

  if (splits == 1) {
    Partial sum = restore(merging + threadIdx.x);
    merge(sum, group);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int q_head = kv_head * kGroupSize + head + 8 * r;
      T* target = static_cast<T*>(params.out) + token * params.out_stride + q_head * kHeadDim +
                  warp * kWarpDims + column;
      const float scale = inverse(sum.sum[r]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        store_pair(target + n * 8, __fmul_rn(sum.out[n][2 * r], scale),
                   __fmul_rn(sum.out[n][2 * r + 1], scale));
      }
      if (params.lse != nullptr && warp == 0 && lane % 4 == 0) {
        params.lse[int64_t{token} * params.heads.num_q_heads + q_head] =
            natural_lse(sum.peak[r], sum.sum[r]);
      }
    }
    wait_for_previous_launch();
    return;
  }

  // A lane if 16 blocks share the list, a group of lanes if 4 do.
  float* parts = static_cast<float*>(params.workspace) +
                 int64_t{token * kv_heads + kv_head} * splits * kPartFloats;
  // [splits, kGroupSize, kHeadDim], then the maxima and the sums, [splits, kGroupSize] each.
  float* peaks = parts + splits * kGroupSize * kHeadDim;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int slot = rank * kGroupSize + head + 8 * r;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float x = splits == kLanes ? lane_part.out[n][2 * r] : group.out[n][2 * r];
      const float y = splits == kLanes ? lane_part.out[n][2 * r + 1] : group.out[n][2 * r + 1];
      *reinterpret_cast<float2*>(parts + slot * kHeadDim + warp * kWarpDims + n * 8 + column) =
          make_float2(x, y);
    }
    if (warp == 0 && lane % 4 == 0) {
      peaks[slot] = splits == kLanes ? lane_part.peak[r] : group.peak[r];
      peaks[splits * kGroupSize + slot] = splits == kLanes ? lane_part.sum[r] : group.sum[r];
    }
  }
  wait_for_previous_launch();
}

// Merges the partial results that sparse_decode_kernel left in the workspace.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ SparseAttentionParams params, const int splits) {
  const int token = blockIdx.x;
  const int kv_head = blockIdx.y;
  const int request = __ldg(params.batch.batch_id_per_token + token);
  if (request < 0) return;
  if (is_prefill(__ldg(params.batch.query_lens + request))) return;
  const int row_index = token * params.heads.num_kv_heads + kv_head;
  const float* parts =
      static_cast<const float*>(params.workspace) + int64_t{row_index} * splits * kPartFloats;
  const float* peaks = parts + splits * kGroupSize * kHeadDim;
  const float* sums = peaks + splits * kGroupSize;
  for (int i = threadIdx.x; i < kGroupSize * kHeadDim; i += kThreads) {
    const int head = i / kHeadDim;
    const int q_head = kv_head * kGroupSize + head;
    if (splits == kLanes) {
      combine<kLanes, T>(params, token, q_head, i % kHeadDim, parts + i, peaks + head, sums + head,
                         kGroupSize * kHeadDim, kGroupSize);
    } else {
      combine<kGroupLanes, T>(params, token, q_head, i % kHeadDim, parts + i, peaks + head,
                              sums + head, kGroupSize * kHeadDim, kGroupSize);
    }
  }
}

using DecodeKernel = void (*)(SparseAttentionParams, int);

template <typename T>
DecodeKernel kernel_with(int stages) {
  if (stages == 5) return sparse_decode_kernel<T, 5>;
  return sparse_decode_kernel<T, 3>;
}

int64_t rows_of(const SparseAttentionParams& params) {
  return int64_t{params.batch.num_tokens} * params.heads.num_kv_heads;
}

// Thread blocks that share a list. Shapes alone decide.
int splits_of(const SparseAttentionParams& params) {
  constexpr int kBlocksWanted = 216;  // two for each multiprocessor of an A100
  if (has_long_rows(params) && rows_of(params) <= kBlocksWanted) return kLanes;
  int splits = kLanes;
  while (splits > 1 && splits * rows_of(params) > kBlocksWanted) splits /= kGroupLanes;
  return splits;
}

}  // namespace

int64_t sparse_decode_workspace(const SparseAttentionParams& params, const Device& device) {
  if (has_sparse_decode_sm90(device)) return 0;
  const int splits = splits_of(params);
  return splits == 1 ? 0 : rows_of(params) * splits * kPartFloats * int64_t{sizeof(float)};
}

Status sparse_decode(const SparseAttentionParams& params, const Device& device, void* stream) {
  if (has_sparse_decode_sm90(device)) return sparse_decode_sm90(params, device, stream);
  const char* op = "sparse_attention";
  constexpr int kStaticBytes = 6 * 1024;
  const bool is_half = params.heads.dtype == kFloat16;
  const int splits = splits_of(params);
  LaunchShape shape;
  shape.threads = kThreads;
  shape.overlap = params.overlap != 0 && device.has_clusters();
  int stages = 5;
  if (shared_bytes(stages, params.budget) + kStaticBytes > device.shared_bytes) stages = 3;
  shape.shared_bytes = shared_bytes(stages, params.budget);
  Check check(op);
  check.require(shape.shared_bytes + kStaticBytes <= device.shared_bytes, "budget",
                std::to_string(params.budget),
                "less: a list that long does not fit into the shared memory of this GPU");
  if (!check.ok()) return check.status();
  const DecodeKernel kernel =
      is_half ? kernel_with<__half>(stages) : kernel_with<__nv_bfloat16>(stages);
  int fits = 0;
  cudaError_t error = count_clusters(kernel, kThreads, shape.shared_bytes, 1, &fits);
  if (error != cudaSuccess) return launch_status(op, error);
  shape.grid = dim3(params.batch.num_tokens * splits, params.heads.num_kv_heads);
  error = launch(kernel, shape, stream, params, splits);
  if (error == cudaSuccess && splits > 1) {
    shape.grid = dim3(params.batch.num_tokens, params.heads.num_kv_heads);
    shape.shared_bytes = 0;
    shape.overlap = false;
    const DecodeKernel merge = is_half ? combine_kernel<__half> : combine_kernel<__nv_bfloat16>;
    error = launch(merge, shape, stream, params, splits);
  }
  return launch_status(op, error);
}

}  // namespace cuda
}  // namespace minicpm41
