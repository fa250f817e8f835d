// Means of the key windows that end in one page.
#pragma once

#include "prefill.h"

namespace minicpm41 {
namespace cuda {

constexpr int kStripsPerPage = kBlockSize / kKernelStride;
constexpr int kStrips = 2 * kStripsPerPage;
constexpr int kStripsPerWindow = kKernelSize / kKernelStride;

static_assert(kCoarseKernelSize == 2 * kBlockSize, "a coarse window is a page and the one before");
static_assert(kCoarseSlots == 1, "one coarse window ends in a page");

// What finish_page reads and writes.
struct WindowCaches {
  const void* k_cache;
  const void* k1_cache;
  const void* k2_cache;
  int num_kv_heads;
};

constexpr int kCoarseWriters = kHeadDim / 2;  // threads of finish_page, the first ones

// Writes the windows that end in page `block` of a request and inside [from, kv_len): the work of
// kWarps warps, which `sync` brings together. Strips of 16 keys are summed, four of the page before
// and four of the page itself; every window is a run of such sums, so its bits do not depend on who
// makes it. `new_coarse`, where not null, receives the coarse one, too.
template <int kWarps, typename T, typename Sync>
__device__ __forceinline__ void finish_page(const WindowCaches& caches, const int32_t* pages,
                                            int kv_head, int block, int from, int kv_len,
                                            int thread, float (*strips)[kHeadDim], T* new_coarse,
                                            const Sync& sync) {
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int half = lane / 16;
  const int chunk = lane % 16;
  // Ends of this page's windows, one past the last key: fine ones after strips 0..3.
  const int start = block * kBlockSize;
  const auto ends_inside = [&](int end, int size) {
    return end > from && end <= kv_len && end >= size;
  };
  const bool has_coarse = ends_inside(start + kBlockSize, kCoarseKernelSize);
  bool has_fine[kFineSlots];
  bool has_any = has_coarse;
#pragma unroll
  for (int slot = 0; slot < kFineSlots; ++slot) {
    has_fine[slot] = ends_inside(start + (slot + 1) * kKernelStride, kKernelSize);
    has_any |= has_fine[slot];
  }
  if (!has_any) return;

#pragma unroll 1
  for (int of = warp; of < kStrips; of += kWarps) {
    const int strip = of - kStripsPerPage;  // of this page; negative: of the page before
    bool is_needed = has_coarse;
#pragma unroll
    for (int slot = 0; slot < kFineSlots; ++slot) {
      // The window of slot s is strips s - 1 and s; strip -1 is the last of the page before.
      is_needed |= has_fine[slot] && (strip == slot || strip == slot - 1);
    }
    if (!is_needed) continue;
    const int slot = of % kStripsPerPage * kKernelStride + half * (kKernelStride / 2);
    // A request without pages has -1 there: what is read then is not written anywhere.
    const int page = max(0, __ldg(pages + (strip < 0 ? block - 1 : block)));
    const T* keys = slot_row<kBlockSize>(static_cast<const T*>(caches.k_cache), page,
                                         caches.num_kv_heads, kv_head, slot);
    uint4 rows[kKernelStride / 2];
#pragma unroll
    for (int i = 0; i < kKernelStride / 2; ++i) {
      rows[i] = *reinterpret_cast<const uint4*>(keys + i * kHeadDim + chunk * 8);
    }
    __syncwarp();  // all are under way before the first is waited for
    float sums[8] = {};
#pragma unroll
    for (int i = 0; i < kKernelStride / 2; ++i) add_chunk<T>(rows[i], sums);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[i] += __shfl_xor_sync(kAllLanes, sums[i], 16);
      if (half == 0) strips[of][chunk * 8 + i] = sums[i];
    }
  }
  sync();

  const int page = __ldg(pages + block);
  // The coarse one first: a whole step waits for it.
  constexpr int kPairs = kCoarseWriters;
#pragma unroll 1
  for (int item = thread; item < (kFineSlots + 1) * kPairs; item += kWarps * kWarpSize) {
    const int slot = item / kPairs - 1;
    const int dim = item % kPairs * 2;
    const bool is_coarse = slot < 0;
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
    const uint32_t pair = Pair<T>::pack(x * scale, y * scale);
    if (is_coarse && new_coarse != nullptr) *reinterpret_cast<uint32_t*>(new_coarse + dim) = pair;
    if (page < 0) continue;
    const T* target = is_coarse ? slot_row<kCoarseSlots>(static_cast<const T*>(caches.k2_cache),
                                                         page, caches.num_kv_heads, kv_head, 0)
                                : slot_row<kFineSlots>(static_cast<const T*>(caches.k1_cache), page,
                                                       caches.num_kv_heads, kv_head, slot);
    *reinterpret_cast<uint32_t*>(const_cast<T*>(target) + dim) = pair;
  }
  sync();
}

}  // namespace cuda
}  // namespace minicpm41
