// A whole decode step of few requests in one launch, on Hopper: a cluster of 16 or 8 thread blocks
// a (token, kv head) finishes the windows that its token completes, makes its list and attends to
// it. What three launches pass through memory stays in the cluster, and the bits are theirs: it is
// the same code, in the same order.
//
// Every block makes the whole list for itself, from scores that all blocks send to each other. Its
// copies of K1 and K2 take the end of the ring that K and V pass through later.
#include "sparse_decode_sm90.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kStepThreads, 1)
    decode_step_sm90_kernel(const __grid_constant__ SelectBlocksParams select,
                            const __grid_constant__ SparseAttentionParams params,
                            const __grid_constant__ CUtensorMap k_map,
                            const __grid_constant__ CUtensorMap v_map, const int splits,
                            const int stages) {
#ifdef MINICPM41_HAS_WGMMA
  attend<T, /*kIsStep=*/true>(params, &select, k_map, v_map, splits, stages, /*by_request=*/false);
#endif
}

}  // namespace

Status decode_step_sm90(const SelectBlocksParams& select, const SparseAttentionParams& params,
                        const Device& device, void* stream, bool* is_launched) {
  const char* op = "attention_step";
  // Scores of local blocks are not made: with one alone, the newest fine window would count.
  if (!has_sparse_decode_sm90(device) || select.local_blocks < 2) return {};
  if (params.batch.max_blocks - select.local_blocks > kMostCandidates<kSelectWarps>) return {};
  const bool is_half = params.heads.dtype == kFloat16;
  const auto kernel =
      is_half ? decode_step_sm90_kernel<__half> : decode_step_sm90_kernel<__nv_bfloat16>;
  const int64_t rows = int64_t{params.batch.num_tokens} * params.heads.num_kv_heads;
  constexpr int kStaticBytes = 2048;
  LaunchShape shape;
  shape.threads = kStepThreads;
  shape.overlap = true;
  // The most blocks a row that run side by side; with less than 8 the launches apart are as good.
  for (shape.cluster = kLanes; shape.cluster >= kLanes / 2; shape.cluster /= 2) {
    const int rest = StepLayout(shape.cluster, params.budget, params.batch.max_blocks).bytes;
    const int stages =
        std::min(kMaxStages, (device.shared_bytes - kStaticBytes - rest) / kTileBytes);
    if (stages < kMinStages) continue;
    shape.shared_bytes = stages * kTileBytes + rest;
    int fits = 0;
    cudaError_t error =
        count_clusters(kernel, shape.threads, shape.shared_bytes, shape.cluster, &fits);
    if (error != cudaSuccess) return launch_status(op, error);
    if (fits < rows) continue;
    CUtensorMap maps[2];
    for (int i = 0; i < 2; ++i) {
      Status status =
          encode_page_map(op, i == 0 ? params.k_cache : params.v_cache, params.batch.num_pages,
                          params.heads.num_kv_heads, params.heads.dtype, &maps[i]);
      if (!status.ok()) return status;
    }
    shape.grid = dim3(params.batch.num_tokens * shape.cluster, params.heads.num_kv_heads);
    *is_launched = true;
    return launch_status(
        op, launch(kernel, shape, stream, select, params, maps[0], maps[1], shape.cluster, stages));
  }
  return {};
}

}  // namespace cuda
}  // namespace minicpm41
