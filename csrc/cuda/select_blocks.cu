// Lists the blocks each row attends to: one cluster (before sm_90: one block) a (token, kv head).
#include "select_blocks.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

template <typename T, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps* kWarpSize, 1)
    select_blocks_kernel(const __grid_constant__ SelectBlocksParams params, const bool by_request) {
  constexpr int kThreads = kWarps * kWarpSize;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float lse_log2[kGroupSize];
  __shared__ __align__(16) TopScratch top_scratch;
  const SelectLayout layout(kWarps, kStages, params.batch.max_blocks);
  __shared__ uint64_t has_coarse;
  __shared__ uint64_t has_scores;

  allow_next_launch();
  const int clusters = cluster_size();
  const int rank = cluster_rank();
  const int cluster_log2 = __ffs(clusters) - 1;  // clusters are powers of two
  const int token = token_of_row(params.batch, blockIdx.x >> cluster_log2, by_request);
  const int kv_head = blockIdx.y;
  // One block waits for the previous launch on behalf of all, so that this one does not end before.
  const bool is_first = blockIdx.x == 0 && kv_head == 0;
  const int thread = threadIdx.x;

  // The table of the request that it most likely is, while the row is looked up.
  if (kStages > kFewLeaves && token >= 0) {
    touch_table(params.batch.block_tables +
                    int64_t{min(token, params.batch.batch_size - 1)} * params.batch.max_blocks,
                params.batch.max_blocks, thread, kThreads);
  }
  QueryRow row;
  if (token < 0 || !load_query_row(params.batch, token, &row) || is_prefill(row.query_len)) {
    wait_without_row(by_request);
    return;
  }
  const int own = row.position / kBlockSize;
  const int budget = params.budget;
  int32_t* list = params.topk_idx + (int64_t{kv_head} * params.batch.num_tokens + token) * budget;
  if (own + 1 <= budget || row.position + 1 < params.dense_len) {
    if (rank == 0) {
#pragma unroll 1
      for (int i = thread; i < budget; i += kThreads) list[i] = i <= own ? i : -1;
    }
    if (is_first) wait_for_previous_launch();
    return;
  }

  if (clusters > 1 && thread == 0) {
    init_barrier(&has_coarse, 1);
    init_barrier(&has_scores, 1);
    publish_barriers();
  }
  const SelectMemory memory =
      select_memory(layout, shared, shared + layout.ring_bytes, lse_log2, &top_scratch, &has_coarse,
                    &has_scores, /*has_windows=*/nullptr, /*new_coarse=*/0, /*q_address=*/0);
  select_row<T, kWarps, kStages, /*kIsStep=*/false>(params, row, token, kv_head, rank, clusters,
                                                    memory, threadIdx.x, list);
  if (is_first) wait_for_previous_launch();
}

}  // namespace

Status select_blocks_decode(const SelectBlocksParams& params, const Device& device, void* stream) {
  const char* op = "select_blocks";

  const int max_blocks = params.batch.max_blocks;
  const DecodeRows row_grid(params.batch);
  const int64_t rows = int64_t{row_grid.count} * params.heads.num_kv_heads;
  LaunchShape shape;
  shape.overlap = params.overlap != 0 && device.has_clusters();
  if (device.has_clusters() && max_blocks > params.budget) {
    // Half of the multiprocessors: sparse_attention begins on the others.
    while (shape.cluster < kMaxCluster && 2 * shape.cluster * rows <= device.multiprocessors / 2) {
      shape.cluster *= 2;
    }
  }
  // Blocks are small where a row has many of them, or where the others do not fit.
  const auto bytes = [&](int warps, int stages) {
    return SelectLayout(warps, stages, max_blocks).bytes() + kStaticBytes;
  };
  const bool is_few =
      shape.cluster == kMaxCluster && bytes(kFewWarps, kMaxLeaves) <= device.shared_bytes;
  const bool is_small = shape.cluster == kMaxCluster || max_blocks <= params.budget ||
                        bytes(kMaxWarps, kFewLeaves) > device.shared_bytes;
  const int warps = is_small ? kFewWarps : kMaxWarps;
  const int stages = is_few ? kMaxLeaves : kFewLeaves;
  Check check(op);
  check.require(
      bytes(warps, stages) <= device.shared_bytes, "max_blocks", std::to_string(max_blocks),
      "fewer: their scores need " + std::to_string(bytes(warps, stages)) +
          " bytes of shared memory and this GPU has " + std::to_string(device.shared_bytes));
  if (!check.ok()) return check.status();
  using Bf16 = __nv_bfloat16;
  const bool is_half = params.heads.dtype == kFloat16;
  const auto few = is_half ? select_blocks_kernel<__half, kFewWarps, kMaxLeaves>
                           : select_blocks_kernel<Bf16, kFewWarps, kMaxLeaves>;
  const auto small = is_half ? select_blocks_kernel<__half, kFewWarps, kFewLeaves>
                             : select_blocks_kernel<Bf16, kFewWarps, kFewLeaves>;
  const auto large = is_half ? select_blocks_kernel<__half, kMaxWarps, kFewLeaves>
                             : select_blocks_kernel<Bf16, kMaxWarps, kFewLeaves>;
  const auto kernel = is_few ? few : is_small ? small : large;
  shape.threads = warps * kWarpSize;
  shape.shared_bytes = bytes(warps, stages) - kStaticBytes;
  // A device whose multiprocessors come in smaller groups holds smaller clusters only.
  for (;; shape.cluster /= 2) {
    int fits = 0;
    const cudaError_t error =
        count_clusters(kernel, shape.threads, shape.shared_bytes, shape.cluster, &fits);
    if (error != cudaSuccess) return launch_status(op, error);
    if (fits >= rows || shape.cluster == 1) break;
  }
  shape.grid = dim3(row_grid.count * shape.cluster, params.heads.num_kv_heads);
  return launch_status(op, launch(kernel, shape, stream, params, row_grid.by_request));
}

}  // namespace cuda
}  // namespace minicpm41
