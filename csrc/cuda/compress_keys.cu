// Means of the key windows that end inside [compress_from, kv_len), each written to the page that
// holds its last token: the kernel for few new tokens a request, and the choice between the two.
//
// One block a (request, kv head, page) that the step may have touched. Each of its 8 warps sums 16
// keys: four of the page before and four of the page itself; every window is a run of such sums, so
// a window's bits do not depend on how a prompt was cut.
#include "hopper.cuh"
#include "prefill.h"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr int kStripsPerPage = kBlockSize / kKernelStride;
constexpr int kStrips = 2 * kStripsPerPage;
constexpr int kCompressThreads = kStrips * kWarpSize;
constexpr int kAllThreads = kCompressThreads + kWarpSize;  // one warp fetches ahead
// So many leave room for the registers of all loads of a strip at once.
constexpr int kResident = 4;
constexpr int kStripsPerWindow = kKernelSize / kKernelStride;
// Of keys that are fetched to L2 ahead, tiles of a block and a kv head, all rows together: 8 MiB of
// the 50 that the L2 of an H100 holds.
constexpr int kTilesAhead = 512;

static_assert(kCoarseKernelSize == 2 * kBlockSize, "a coarse window is a page and the one before");
static_assert(kCoarseSlots == 1, "one coarse window ends in a page");

// One warp fetches keys of a short row to L2; others would wait for the copy engine to take what
// they ask. It may run while the launch before still writes: what it reads decides only about that,
// and does not pass through L1, where it would stay.
__device__ __forceinline__ void fetch_ahead(const CompressKeysParams& params, int request,
                                            int kv_head, int tiles) {
#ifdef MINICPM41_HAS_WGMMA
  // A row of at most so many blocks attends to all of them; of a longer one that is not known here.
  constexpr int kShortBlocks = 64;
  constexpr int kTileBytes = kBlockSize * kRowBytes;
  const Batch& batch = params.batch;
  const int query_len = __ldcg(batch.query_lens + request);
  const int kv_len = __ldcg(batch.history_lens + request) + query_len;
  const int blocks = min((kv_len + kBlockSize - 1) / kBlockSize, batch.max_blocks);
  if (query_len == 0 || blocks > kShortBlocks) return;
  for (int block = threadIdx.x % kWarpSize; block < min(tiles, blocks); block += kWarpSize) {
    const int page = __ldcg(batch.block_tables + int64_t{request} * batch.max_blocks + block);
    if (page < 0 || page >= batch.num_pages) continue;
    fetch_to_l2(static_cast<const char*>(params.k_cache) +
                    (int64_t{page} * params.heads.num_kv_heads + kv_head) * kTileBytes,
                kTileBytes);
  }
#endif
}

template <typename T>
__global__ void __launch_bounds__(kAllThreads, kResident)
    compress_keys_kernel(const CompressKeysParams params, const int tiles_ahead) {
  __shared__ float strips[kStrips][kHeadDim];
  const int request = blockIdx.z;
  const int kv_head = blockIdx.y;
  // A shuffle shows that a warp goes one way.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  if (warp == kStrips) {
    if (blockIdx.x == 0) fetch_ahead(params, request, kv_head, tiles_ahead);
    return;
  }
  // Launched ahead of its turn, whatever comes before: that may still write keys from history_lens
  // on, for which one has to wait, and nothing else of what is read here.
  const int query_len = __ldcg(params.batch.query_lens + request);
  const int history_len = __ldcg(params.batch.history_lens + request);
  const int kv_len = history_len + query_len;
  const int from =
      params.compress_from == nullptr ? history_len : __ldcg(params.compress_from + request);
  bool has_waited = false;
  const auto take_turn = [&] {
    if (has_waited) return;
    has_waited = true;
    wait_for_previous_launch();
    // The next launch reads windows of earlier steps at once. Those are never rewritten here, for a
    // rebuild goes to the other kernel.
    allow_next_launch();
  };

  const int kv_heads = params.heads.num_kv_heads;
  const int32_t* pages = params.batch.block_tables + int64_t{request} * params.batch.max_blocks;
  const T* k_cache = static_cast<const T*>(params.k_cache);
  const int lane = threadIdx.x % kWarpSize;
  const int half = lane / 16;
  const int chunk = lane % 16;

  for (int block = from / kBlockSize + blockIdx.x; query_len > 0 && block * kBlockSize < kv_len;
       block += gridDim.x) {
    // Ends of this page's windows, one past the last key: fine ones after strips 0..3.
    const int start = block * kBlockSize;
    const auto ends_inside = [&](int end, int size) {
      return end > from && end <= kv_len && end >= size;
    };
    const bool has_coarse = ends_inside(start + kBlockSize, kCoarseKernelSize);
    bool has_any = has_coarse;
    bool is_needed = has_coarse;
    const int strip = warp - kStripsPerPage;  // of this page; negative: of the page before
#pragma unroll
    for (int slot = 0; slot < kFineSlots; ++slot) {
      // The window of slot s is strips s - 1 and s; strip -1 is the last of the page before.
      const bool has_fine = ends_inside(start + (slot + 1) * kKernelStride, kKernelSize);
      has_any |= has_fine;
      is_needed |= has_fine && (strip == slot || strip == slot - 1);
    }
    if (!has_any) continue;

    const int page = __ldcg(pages + block);
    if (is_needed) {
      const int source_block = warp < kStripsPerPage ? block - 1 : block;
      const int slot = (warp % kStripsPerPage) * kKernelStride + half * (kKernelStride / 2);
      // A request without pages has -1 there: what is read then is not written anywhere.
      const int source_page = max(0, warp < kStripsPerPage ? __ldcg(pages + source_block) : page);
      const T* keys = slot_row<kBlockSize>(k_cache, source_page, kv_heads, kv_head, slot);
      const auto load_row = [&](int i) {
        return *reinterpret_cast<const uint4*>(keys + i * kHeadDim + chunk * 8);
      };
      const int first = source_block * kBlockSize + slot;
      uint4 rows[kKernelStride / 2];
#pragma unroll
      for (int i = 0; i < kKernelStride / 2; ++i) {
        if (first + i < history_len) rows[i] = load_row(i);
      }
      take_turn();
#pragma unroll
      for (int i = 0; i < kKernelStride / 2; ++i) {
        if (first + i >= history_len) rows[i] = load_row(i);
      }
      float sums[8] = {};
#pragma unroll
      for (int i = 0; i < kKernelStride / 2; ++i) add_chunk<T>(rows[i], sums);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums[i] += __shfl_xor_sync(kAllLanes, sums[i], 16);
        if (half == 0) strips[warp][chunk * 8 + i] = sums[i];
      }
    }
    take_turn();
    __syncthreads();

    const int items = page < 0 ? 0 : (kFineSlots + 1) * kHeadDim / 2;
    for (int item = threadIdx.x; item < items; item += kCompressThreads) {
      const int slot = item / (kHeadDim / 2);
      const int dim = item % (kHeadDim / 2) * 2;
      const bool is_coarse = slot == kFineSlots;
      if (is_coarse ? !has_coarse : !ends_inside(start + (slot + 1) * kKernelStride, kKernelSize)) {
        continue;
      }
      const int last = is_coarse ? kStrips - 1 : kStripsPerPage + slot;
      const int count = is_coarse ? kStrips : kStripsPerWindow;
      float x = 0.0f;
      float y = 0.0f;
      for (int s = last - count + 1; s <= last; ++s) {
        x += strips[s][dim];
        y += strips[s][dim + 1];
      }
      const float scale = is_coarse ? 1.0f / kCoarseKernelSize : 1.0f / kKernelSize;
      T* target = is_coarse
                      ? const_cast<T*>(slot_row<kCoarseSlots>(
                            static_cast<const T*>(params.k2_cache), page, kv_heads, kv_head, 0))
                      : const_cast<T*>(slot_row<kFineSlots>(static_cast<const T*>(params.k1_cache),
                                                            page, kv_heads, kv_head, slot));
      *reinterpret_cast<uint32_t*>(target + dim) = Pair<T>::pack(x * scale, y * scale);
    }
    __syncthreads();
  }
  take_turn();
}

template __global__ void compress_keys_kernel<__half>(const CompressKeysParams, const int);
template __global__ void compress_keys_kernel<__nv_bfloat16>(const CompressKeysParams, const int);

}  // namespace

Status run_compress_keys(const CompressKeysParams& params, void* stream) {
  const char* op = "compress_keys";
  Status status = validate(params);
  if (!status.ok()) return status;
  Device device;
  status = check_geometry(op, params.heads, &device, /*reads_queries=*/false);
  if (!status.ok() || params.batch.batch_size == 0) return status;
  Check check(op);
  check.require(params.batch.batch_size <= 65535, "batch_size",
                std::to_string(params.batch.batch_size), "at most 65535 on a GPU");
  if (!check.ok()) return check.status();

  // Both kernels give the same bits, so the shapes may decide.
  const Batch& batch = params.batch;
  const bool is_rebuild =
      params.compress_from != nullptr && params.compress_from != batch.history_lens;
  if (is_rebuild || is_prefill(batch.max_query_len)) return compress_keys_prefill(params, stream);

  // New tokens of one request touch one page, or two where they are more than one.
  static_assert(kPrefillTokens <= kBlockSize, "few tokens touch two pages at most");
  const int width = batch.num_tokens > batch.batch_size ? 2 : 1;
  LaunchShape shape;
  shape.grid = dim3(std::min(width, batch.max_blocks), params.heads.num_kv_heads, batch.batch_size);
  shape.threads = kAllThreads;
  shape.overlap = device.has_clusters();
  const int tiles_ahead = kTilesAhead / (batch.batch_size * params.heads.num_kv_heads);
  const auto kernel = params.heads.dtype == kFloat16 ? compress_keys_kernel<__half>
                                                     : compress_keys_kernel<__nv_bfloat16>;
  return launch_status(op, launch(kernel, shape, stream, params, tiles_ahead));
}

}  // namespace cuda
}  // namespace minicpm41
