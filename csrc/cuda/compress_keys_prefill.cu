// Means of key windows for many tokens: prompts, and prefixes whose pages came without windows.
//
// One block a run of neighbouring pages of one kv head. Strips of 16 keys are summed once each, the
// page before the run being summed again, and every window is a run of strips. The order of the
// additions is that of the kernel for few tokens, so a window's bits do not depend on which of the
// two wrote it. Windows of keys that were there before this step need not wait for the launch
// before this one, which writes new keys alone.
#include "prefill.h"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr int kStripsPerPage = kBlockSize / kKernelStride;
constexpr int kRunPages = 2;
constexpr int kRunStrips = (kRunPages + 1) * kStripsPerPage;
constexpr int kRunWarps = 4;
constexpr int kRunThreads = kRunWarps * kWarpSize;
constexpr int kStripsPerFine = kKernelSize / kKernelStride;
constexpr int kStripsPerCoarse = kCoarseKernelSize / kKernelStride;
// More blocks than this bring nothing; those of a batch of many short rows mostly have no work.
constexpr int kMaxBlocks = 8192;

static_assert(kStripsPerFine == 2 && kStripsPerCoarse == 2 * kStripsPerPage && kCoarseSlots == 1,
              "a fine window is two strips, a coarse one a page and the one before");

// Adds up 16 keys: the upper and the lower half warp take 8 each. Both hold the sums after.
template <typename T>
__device__ __forceinline__ void sum_strip(const T* keys, int lane, float (&sums)[8]) {
  const T* first = keys + (lane / 16) * (kKernelStride / 2) * kHeadDim + lane % 16 * 8;
  uint4 rows[kKernelStride / 2];
#pragma unroll
  for (int i = 0; i < kKernelStride / 2; ++i) {
    rows[i] = __ldg(reinterpret_cast<const uint4*>(first + i * kHeadDim));
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kKernelStride / 2; ++i) add_chunk<T>(rows[i], sums);
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], 16);
}

// Writes 8 dimensions of the mean of `count` strips.
template <typename T>
__device__ __forceinline__ void write_mean(const float (*strips)[kHeadDim], int count, int dim,
                                           T* target) {
  float sums[8] = {};
  for (int s = 0; s < count; ++s) {
    const float4 low = *reinterpret_cast<const float4*>(&strips[s][dim]);
    const float4 high = *reinterpret_cast<const float4*>(&strips[s][dim + 4]);
    sums[0] += low.x;
    sums[1] += low.y;
    sums[2] += low.z;
    sums[3] += low.w;
    sums[4] += high.x;
    sums[5] += high.y;
    sums[6] += high.z;
    sums[7] += high.w;
  }
  const float scale = 1.0f / (count * kKernelStride);
  uint4 packed;
  packed.x = Pair<T>::pack(sums[0] * scale, sums[1] * scale);
  packed.y = Pair<T>::pack(sums[2] * scale, sums[3] * scale);
  packed.z = Pair<T>::pack(sums[4] * scale, sums[5] * scale);
  packed.w = Pair<T>::pack(sums[6] * scale, sums[7] * scale);
  *reinterpret_cast<uint4*>(target + dim) = packed;
}

template <typename T>
__global__ void __launch_bounds__(kRunThreads)
    compress_keys_prefill_kernel(const __grid_constant__ CompressKeysParams params) {
  __shared__ __align__(16) float strips[kRunStrips][kHeadDim];
  const Batch& batch = params.batch;
  const int request = blockIdx.z;
  const int kv_head = blockIdx.y;
  const int kv_heads = params.heads.num_kv_heads;
  // One block waits on behalf of those without work, so that this launch ends after the one before.
  if (blockIdx.x + blockIdx.y + blockIdx.z == 0) wait_for_previous_launch();
  const int query_len = __ldg(batch.query_lens + request);
  if (query_len == 0) return;
  const int history_len = __ldg(batch.history_lens + request);
  const int from =
      params.compress_from == nullptr ? history_len : max(0, __ldg(params.compress_from + request));
  const int kv_len = history_len + query_len;
  const int num_blocks = min((kv_len + kBlockSize - 1) / kBlockSize, batch.max_blocks);
  const int32_t* pages = batch.block_tables + int64_t{request} * batch.max_blocks;
  const T* k_cache = static_cast<const T*>(params.k_cache);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;

  for (int first = from / kBlockSize + blockIdx.x * kRunPages; first < num_blocks;
       first += gridDim.x * kRunPages) {
    // The launch before this one writes the new keys.
    if ((first + kRunPages) * kBlockSize > history_len) {
      wait_for_previous_launch();
      // A single token may read windows of its history before this launch has ended.
      if (from >= history_len || query_len > 1) allow_next_launch();
    }
    for (int index = warp; index < kRunStrips; index += kRunWarps) {
      const int strip = (first - 1) * kStripsPerPage + index;
      // A strip that is not whole is in no window.
      if (strip < 0 || (strip + 1) * kKernelStride > kv_len) continue;
      const int block = strip / kStripsPerPage;
      if (block >= num_blocks) continue;
      const int page = __ldg(pages + block);
      if (page < 0) continue;
      float sums[8];
      sum_strip<T>(slot_row<kBlockSize>(k_cache, page, kv_heads, kv_head,
                                        strip % kStripsPerPage * kKernelStride),
                   lane, sums);
      if (lane < 16) {
        float4* row = reinterpret_cast<float4*>(&strips[index][lane * 8]);
        row[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
        row[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
      }
    }
    __syncthreads();

    constexpr int kChunks = kHeadDim / 8;
    constexpr int kItems = kRunPages * (kFineSlots + kCoarseSlots) * kChunks;
    for (int item = threadIdx.x; item < kItems; item += kRunThreads) {
      const int dim = item % kChunks * 8;
      const int slot = item / kChunks % (kFineSlots + kCoarseSlots);
      const int offset = item / kChunks / (kFineSlots + kCoarseSlots);
      const int block = first + offset;
      const bool is_coarse = slot == kFineSlots;
      const int strips_before_end = is_coarse ? kStripsPerPage : slot + 1;
      const int end = block * kBlockSize + strips_before_end * kKernelStride;
      const int count = is_coarse ? kStripsPerCoarse : kStripsPerFine;
      if (block >= num_blocks || end <= from || end > kv_len || end < count * kKernelStride) {
        continue;
      }
      const int page = __ldg(pages + block);
      if (page < 0) continue;
      T* target = is_coarse
                      ? static_cast<T*>(params.k2_cache) +
                            (int64_t{page} * kv_heads + kv_head) * kCoarseSlots * kHeadDim
                      : static_cast<T*>(params.k1_cache) +
                            ((int64_t{page} * kv_heads + kv_head) * kFineSlots + slot) * kHeadDim;
      const int last = (offset + 1) * kStripsPerPage + strips_before_end;
      write_mean<T>(strips + last - count, count, dim, target);
    }
    __syncthreads();
  }
}

template __global__ void compress_keys_prefill_kernel<__half>(
    const __grid_constant__ CompressKeysParams);
template __global__ void compress_keys_prefill_kernel<__nv_bfloat16>(
    const __grid_constant__ CompressKeysParams);

}  // namespace

Status compress_keys_prefill(const CompressKeysParams& params, void* stream) {
  Device device;
  const Status status = current_device("compress_keys", &device);
  if (!status.ok()) return status;
  const Batch& batch = params.batch;
  // A rebuild may touch every block of a request, new tokens only their own.
  const bool is_rebuild = params.compress_from != nullptr;
  const int blocks = is_rebuild ? batch.max_blocks
                                : std::min(batch.max_blocks, batch.max_query_len / kBlockSize + 2);
  const int64_t rows = int64_t{batch.batch_size} * params.heads.num_kv_heads;
  const int most = static_cast<int>(std::max<int64_t>(8, kMaxBlocks / rows));
  LaunchShape shape;
  shape.grid = dim3(std::min((blocks + kRunPages - 1) / kRunPages, most), params.heads.num_kv_heads,
                    batch.batch_size);
  shape.threads = kRunThreads;
  shape.overlap = device.has_clusters();
  const auto kernel = params.heads.dtype == kFloat16 ? compress_keys_prefill_kernel<__half>
                                                     : compress_keys_prefill_kernel<__nv_bfloat16>;
  return launch_status("compress_keys", launch(kernel, shape, stream, params));
}

}  // namespace cuda
}  // namespace minicpm41
