// sparse_decode on Hopper: a cluster of 1 to 16 thread blocks a (token, kv head).
#include "sparse_decode_sm90.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kAllThreads, 1)
    sparse_decode_sm90_kernel(const __grid_constant__ SparseAttentionParams params,
                              const __grid_constant__ CUtensorMap k_map,
                              const __grid_constant__ CUtensorMap v_map, const int splits,
                              const int stages, const bool by_request) {
#ifdef MINICPM41_HAS_WGMMA
  attend<T, /*kIsStep=*/false>(params, nullptr, k_map, v_map, splits, stages, by_request);
#endif
}

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
    // Where every multiprocessor works, deep rings let some run ahead of the others.
    const bool is_full = 2 * cluster * rows > device.multiprocessors;
    const int rest = Layout(cluster, params.budget).bytes + kStaticBytes;
    stages =
        std::min(is_full ? kMinStages + 1 : kMaxStages, (device.shared_bytes - rest) / kTileBytes);
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
