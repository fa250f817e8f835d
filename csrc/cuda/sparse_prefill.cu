// Attention of the rows of prefill requests, for every GPU but those of sm_90a, which
// sparse_prefill_sm90.cu serves.
//
// Neighbouring tokens list mostly the same blocks. A thread block takes 8 of them, a warp each with
// its 16 heads, and walks the union of their lists; a warp takes part in the blocks that its token
// lists. While one block is worked on, the next is on its way.
#include "prefill_attention.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTokens = kWarps;
constexpr int kTileBytes = kBlockSize * kRowBytes;
constexpr int kSharedBytes = 2 * 2 * kTileBytes + kMarkedBlocks * kMarkBits / 8;

// K and V of one block; keys after `last` may never have been written and become 0.
template <typename T>
__device__ __forceinline__ void copy_block(uint32_t stage, const SparseAttentionParams& params,
                                           int page, int kv_head, int block, int last) {
  const int kv_heads = params.heads.num_kv_heads;
  const T* keys =
      slot_row<kBlockSize>(static_cast<const T*>(params.k_cache), page, kv_heads, kv_head, 0);
  const T* values =
      slot_row<kBlockSize>(static_cast<const T*>(params.v_cache), page, kv_heads, kv_head, 0);
#pragma unroll
  for (int i = threadIdx.x; i < kBlockSize * kRowChunks; i += kThreads) {
    const int key = i / kRowChunks;
    const int chunk = i % kRowChunks;
    const bool is_there = block * kBlockSize + key <= last;
    copy_chunk(stage + swizzled(key, chunk), keys + i * 8, is_there);
    copy_chunk(stage + kTileBytes + swizzled(key, chunk), values + i * 8, is_there);
  }
}

template <typename T>
__device__ __forceinline__ void multiply_keys(float (&scores)[kScores],
                                              const uint32_t (&q)[kKSteps][4], uint32_t keys,
                                              int lane) {
#pragma unroll
  for (int n = 0; n < kBlockSize / 8; ++n) {
    float sums[4] = {};
#pragma unroll
    for (int two = 0; two < kKSteps; two += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, keys + swizzled(n * 8 + lane % 8, two * 2 + lane / 8));
      mma_16x8x16<T>(sums, q[two], b[0], b[1]);
      mma_16x8x16<T>(sums, q[two + 1], b[2], b[3]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) scores[4 * n + c] = sums[c];
  }
}

template <typename T>
__device__ __forceinline__ void multiply_values(float (&out)[kOutputs],
                                                const uint32_t (&weights)[kBlockSize / 16][4],
                                                uint32_t values, int lane) {
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; n += 2) {
    float sums[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = out[4 * n + i];
#pragma unroll
    for (int step = 0; step < kBlockSize / 16; ++step) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, values + swizzled(step * 16 + lane % 16, n + lane / 16));
      mma_16x8x16<T>(sums[0], weights[step], b[0], b[1]);
      mma_16x8x16<T>(sums[1], weights[step], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) out[4 * n + i] = sums[i / 4][i % 4];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_prefill_kernel(const __grid_constant__ SparseAttentionParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  uint32_t* marks = reinterpret_cast<uint32_t*>(shared + 4 * kTileBytes);
  const int lane = threadIdx.x % kWarpSize;
  const int token = threadIdx.x / kWarpSize;
  const int kv_head = blockIdx.y;
  // The latest positions, whose lists are the longest, come first.
  const Cut cut = cut_call(params.batch, kTokens, kTokens, 1, 1, 0, lane);
  const int index = cut.tiles[0] - 1 - static_cast<int>(blockIdx.x);
  if (index < 0) return;
  const Tile tile = find_tile(params.batch, cut, 0, index, lane);
  const int last = tile.position + tile.rows - 1;
  const int position = tile.position + token;

  // A warp past the tile's last row reads that row's queries; nothing is marked for it.
  uint32_t q[kKSteps][4];
  load_q(q,
         static_cast<const T*>(params.q) +
             (tile.row + min(token, tile.rows - 1)) * params.q_stride +
             kv_head * kGroupSize * kHeadDim,
         lane);
  const float scale_log2 = params.softmax_scale * kLog2e;
  Softmax state;
  state.clear();

  const int32_t* pages =
      params.batch.block_tables + int64_t{tile.request} * params.batch.max_blocks;
  const int blocks = blocks_of(params.batch, tile);
  for (int base = 0; base < blocks; base += kMarkedBlocks) {
    const int count = min(blocks - base, kMarkedBlocks);
    __syncthreads();  // the marks before these are read
    mark_dense(marks, params, tile, base, count, threadIdx.x, kThreads);
    __syncthreads();
    mark_listed(marks, params, tile, kv_head, base, count, threadIdx.x, kThreads);
    __syncthreads();

    MarkedBlocks walk(marks, pages + base, 0, count, params.batch.num_pages, lane);
    uint32_t stage = shared_address(shared);
    uint32_t other_stage = stage + 2 * kTileBytes;
    int next_block, next_mark, page;
    bool has_next = walk.next(&next_block, &next_mark, &page);
    if (has_next) copy_block<T>(stage, params, page, kv_head, base + next_block, last);
    commit_copies();
    while (has_next) {
      const int block = base + next_block;
      const int mark = next_mark;
      wait_copies<0>();
      __syncthreads();  // the block has landed, and the one before it is read
      has_next = walk.next(&next_block, &next_mark, &page);
      if (has_next) copy_block<T>(other_stage, params, page, kv_head, base + next_block, last);
      commit_copies();
      if (mark >> token & 1) {
        float scores[kScores];
        uint32_t weights[kBlockSize / 16][4];
        multiply_keys<T>(scores, q, stage, lane);
        const int last_key =
            block == position / kBlockSize ? position % kBlockSize : kBlockSize - 1;
        weigh<T>(weights, scores, state, scale_log2, last_key, lane);
        multiply_values<T>(state.out, weights, stage + kTileBytes, lane);
      }
      const uint32_t read = stage;
      stage = other_stage;
      other_stage = read;
    }
  }
  if (token < tile.rows) write_row<T>(params, tile.row + token, kv_head, state, lane);
}

}  // namespace

int64_t sparse_prefill_workspace(const SparseAttentionParams& params, const Device& device) {
  if (!is_prefill(params.batch.max_query_len)) return 0;
  const bool is_hopper = device.major == 9 && has_sparse_prefill_sm90();
  return is_hopper ? sparse_prefill_sm90_workspace(params, device) : 0;
}

Status sparse_prefill(const SparseAttentionParams& params, const Device& device, void* stream) {
  if (device.major == 9 && has_sparse_prefill_sm90()) {
    return sparse_prefill_sm90(params, device, stream);
  }
  const char* op = "sparse_attention";
  const auto kernel = params.heads.dtype == kFloat16 ? sparse_prefill_kernel<__half>
                                                     : sparse_prefill_kernel<__nv_bfloat16>;
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = kSharedBytes;
  int fits = 0;
  const cudaError_t error = count_clusters(kernel, kThreads, kSharedBytes, 1, &fits);
  if (error != cudaSuccess) return launch_status(op, error);
  shape.grid =
      dim3(static_cast<unsigned>(most_tiles(params.batch, kTokens)), params.heads.num_kv_heads);
  return launch_status(op, launch(kernel, shape, stream, params));
}

}  // namespace cuda
}  // namespace minicpm41
