// Lists the blocks each row attends to: log-sum-exp over K2, scores over K1, pooling, top-k.
//
// One cluster (before sm_90: one block) a (token, kv head). A warp takes 16 windows at a time, a
// leaf, through its own ring of copies, so warps do not wait for each other before the normaliser.
// The bits of a leaf and the order in which leaves are merged depend on the row alone, never on how
// many blocks share it.
//
// A window is stored in the page of its last key. So flat slot u = 4 * page + slot holds window u -
// 1, page b holds coarse window b - 1, and the five windows that overlap block b are the four slots
// of its page and the first slot of the next.
#include "prefill.h"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLeafRows = 16;
constexpr int kLeafBytes = kLeafRows * kRowBytes;
constexpr int kLeafBlocks = kLeafRows / kFineSlots;
constexpr int kMaxCluster = 16;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kMaxPasses = 32 / kDigitBits;
// Shallow rings leave room for two blocks a multiprocessor; before sm_90, where there are no
// clusters to feed, holding to two would spill.
#if __CUDA_ARCH__ >= 900
constexpr int kShallowBlocks = 2;
#else
constexpr int kShallowBlocks = 1;
#endif
constexpr int kStaticBytes = 6 * 1024;  // at most, of the fixed shared arrays

__device__ __forceinline__ uint32_t ordered(float score) {
  const uint32_t bits = __float_as_uint(fmaxf(score, -3.4e38f) + 0.0f);
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

// Sizes of the dynamic shared memory, in the order it is laid out.
struct Layout {
  int ring_bytes;
  int max_leaves;  // of K2
  int max_blocks;
  __host__ __device__ Layout(int stages, int blocks)
      : ring_bytes(stages * kWarps * kLeafBytes),
        max_leaves(blocks / kLeafRows + 1),
        max_blocks(blocks) {}
  __host__ __device__ int bytes() const {
    return ring_bytes + max_leaves * kGroupSize * static_cast<int>(sizeof(float2)) +
           (2 * max_blocks + 2) * static_cast<int>(sizeof(float));
  }
};

// Scratch of write_top; `bins` must be 0 before.
struct TopScratch {
  int bins[kMaxPasses][kDigits];
  uint32_t warp_least[kWarps];
  uint32_t warp_largest[kWarps];
  int warp_counts[kWarps];
};

// Writes the `count` largest of keys[0, n) as ids first_id + index, ascending, ties to the lower
// id; 0 < count < n. `least` and `largest` bound the thread's own share of the keys.
__device__ __forceinline__ void write_top(const uint32_t* keys, int n, int count, uint32_t least,
                                          uint32_t largest, int first_id, TopScratch& scratch,
                                          int32_t* out) {
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  least = __reduce_min_sync(kAllLanes, least);
  largest = __reduce_max_sync(kAllLanes, largest);
  if (lane == 0) {
    scratch.warp_least[warp] = least;
    scratch.warp_largest[warp] = largest;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    least = min(least, scratch.warp_least[w]);
    largest = max(largest, scratch.warp_largest[w]);
  }

  // The leading digits of the smallest chosen key, above the least one: those bits alone tell keys
  // apart. `open` of the keys that begin with `prefix` are chosen, and all that are above it. Every
  // warp reads the histogram for itself.
  int bits = 32 - __clz(largest - least);  // not yet looked at
  uint32_t prefix = 0;
  int open = count;
#pragma unroll 1
  for (int pass = 0; bits > 0; ++pass) {
    const int width = min(bits, kDigitBits);
    const int shift = bits - width;
    const uint32_t top_digit = (1u << width) - 1;
    int* bins = scratch.bins[pass];  // descending digits
#pragma unroll 1
    for (int i = thread; i < n; i += kThreads) {
      const uint64_t key = keys[i] - least;
      if (static_cast<uint32_t>(key >> bits) == prefix) {
        atomicAdd(&bins[top_digit - (static_cast<uint32_t>(key >> shift) & top_digit)], 1);
      }
    }
    __syncthreads();
    constexpr int kLaneBins = kDigits / kWarpSize;
    int sizes[kLaneBins];
#pragma unroll
    for (int i = 0; i < kLaneBins; i += 4) {
      const int4 four = *reinterpret_cast<const int4*>(bins + lane * kLaneBins + i);
      sizes[i] = four.x;
      sizes[i + 1] = four.y;
      sizes[i + 2] = four.z;
      sizes[i + 3] = four.w;
    }
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kLaneBins; ++i) sum += sizes[i];
    int before = sum;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, offset);
      if (lane >= offset) before += other;
    }
    before -= sum;
    const unsigned owners = __ballot_sync(kAllLanes, before < open && open <= before + sum);
    int bin = lane * kLaneBins;
    int size = 0;
    bool is_found = false;
#pragma unroll
    for (int i = 0; i < kLaneBins; ++i) {
      if (!is_found) {
        size = sizes[i];
        is_found = open <= before + size;
        if (!is_found) {
          before += size;
          ++bin;
        }
      }
    }
    const int owner = __ffs(owners) - 1;
    bin = __shfl_sync(kAllLanes, bin, owner);
    size = __shfl_sync(kAllLanes, size, owner);
    open -= __shfl_sync(kAllLanes, before, owner);
    prefix = (prefix << width) | (top_digit - bin);
    bits = shift;
    if (size == open) break;
  }

  // Each thread owns a run of ids; one sum carries the counts above and at the threshold.
  constexpr int kEqualShift = 16;
  constexpr int kAboveMask = (1 << kEqualShift) - 1;
  const int run = (n + kThreads - 1) / kThreads;
  const int begin = min(thread * run, n);
  const int end = min(begin + run, n);
  int counts = 0;
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const uint32_t digits = (keys[i] - least) >> bits;
    counts += (digits > prefix) + ((digits == prefix) << kEqualShift);
  }
  int before = counts;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == kWarpSize - 1) scratch.warp_counts[warp] = before;
  before -= counts;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps - 1; ++w) {
    if (w < warp) before += scratch.warp_counts[w];
  }
  int equal_before = before >> kEqualShift;
  int place = (before & kAboveMask) + min(equal_before, open);
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const uint32_t digits = (keys[i] - least) >> bits;
    const bool is_equal = digits == prefix;
    if (digits > prefix || (is_equal && equal_before < open)) out[place++] = first_id + i;
    equal_before += is_equal;
  }
}

template <typename T, int kStages>
__global__ void __launch_bounds__(kThreads, kStages < 5 ? kShallowBlocks : 1)
    select_blocks_kernel(const __grid_constant__ SelectBlocksParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float lse_log2[kGroupSize];
  __shared__ __align__(16) TopScratch top_scratch;
  const Layout layout(kStages, params.batch.max_blocks);
  // [kGroupSize, max_leaves]: maximum and sum of each leaf of K2, complete in every block.
  float2* leaves = reinterpret_cast<float2*>(shared + layout.ring_bytes);
  // Complete in the cluster's first block: largest score of a block's own slots, and of its first.
  float* own_slots = reinterpret_cast<float*>(leaves + layout.max_leaves * kGroupSize);
  float* first_slot = own_slots + layout.max_blocks + 1;

  allow_next_launch();
  const int clusters = cluster_size();
  const int rank = cluster_rank();
  const int cluster_log2 = __ffs(clusters) - 1;  // clusters are powers of two
  const int token = blockIdx.x >> cluster_log2;
  const int kv_head = blockIdx.y;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;

  QueryRow row;
  if (!load_query_row(params.batch, token, &row) ||
      (kSelectHasPrefill && is_prefill(row.query_len))) {
    wait_for_previous_launch();
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
    wait_for_previous_launch();
    return;
  }
  if (clusters > 1) cluster_arrive();

  // Candidates are blocks [first_candidate, first_local); the first local block only lends its
  // first slot to the candidate before it.
  const int first_candidate = params.init_blocks;
  const int first_local = own - params.local_blocks + 1;
  const int num_fine = max(0, (row.position + 1) / kKernelStride - 1);
  const int num_coarse = max(0, (row.position + 1) / kCoarseKernelStride - 1);
  const int num_coarse_leaves = (num_coarse + kLeafRows) / kLeafRows;
  const int coarse_begin = (rank * num_coarse_leaves >> cluster_log2);
  const int coarse_end = ((rank + 1) * num_coarse_leaves >> cluster_log2);
  const int fine_base = first_candidate / kLeafBlocks;
  const int num_fine_leaves = first_local / kLeafBlocks + 1 - fine_base;
  const int fine_begin = fine_base + (rank * num_fine_leaves >> cluster_log2);
  const int fine_end = fine_base + ((rank + 1) * num_fine_leaves >> cluster_log2);

  // Windows that this very step completes come from the previous launch: of a single token the last
  // coarse one alone counts here, if any, for its last fine one overlaps only local blocks.
  if (row.query_len > 1 || params.local_blocks < 2) wait_for_previous_launch();
  const bool last_is_new = (row.position + 1) % kCoarseKernelStride == 0;

  // The warp's leaves, coarse ones first.
  const int my_coarse = max(0, (coarse_end - coarse_begin - warp + kWarps - 1) / kWarps);
  const int my_fine = max(0, (fine_end - fine_begin - warp + kWarps - 1) / kWarps);
  const int my_leaves = my_coarse + my_fine;
  const int kv_heads = params.heads.num_kv_heads;
  const uint32_t my_ring = shared_address(shared) + warp * kStages * kLeafBytes;
  const int copy_row = lane / kRowChunks;  // and every second row after it
  const int chunk = lane % kRowChunks;
  const auto first_row_of = [&](int item) {
    return item < my_coarse ? (coarse_begin + warp + item * kWarps) * kLeafRows
                            : (fine_begin + warp + (item - my_coarse) * kWarps) * kLeafRows;
  };

  // The pages of a leaf, one a lane: one for each row of K2, one for every four rows of K1.
  const auto load_pages = [&](int item) {
    const bool is_coarse = item < my_coarse;
    const int page_shift = is_coarse ? 0 : 2;  // log2 of the slots of a page
    const int block = (first_row_of(item) >> page_shift) + lane;
    const bool is_valid = item < my_leaves && lane < (kLeafRows >> page_shift) &&
                          block <= (is_coarse ? num_coarse : num_fine / kFineSlots);
    return is_valid ? __ldg(row.pages + block) : 0;
  };
  const auto load_leaf = [&](int item, int pages) {
    if (item < my_leaves) {
      const uint32_t stage = my_ring + item % kStages * kLeafBytes;
      const bool is_coarse = item < my_coarse;
      const int base = first_row_of(item);
      const int last = is_coarse ? num_coarse : num_fine;
      if (is_coarse && last_is_new && base <= last && last < base + kLeafRows) {
        wait_for_previous_launch();
      }
      const char* cache = static_cast<const char*>(is_coarse ? params.k2_cache : params.k1_cache);
      const int slots = is_coarse ? kCoarseSlots : kFineSlots;
#pragma unroll
      for (int i = 0; i < kLeafRows / 2; ++i) {
        const int leaf_row = copy_row + 2 * i;
        const int page =
            __shfl_sync(kAllLanes, pages, is_coarse ? leaf_row : leaf_row / kFineSlots);
        const int64_t cache_row =
            (int64_t{page} * kv_heads + kv_head) * slots + (leaf_row & (slots - 1));
        copy_chunk(stage + swizzled(leaf_row, chunk),
                   cache + cache_row * kRowBytes + chunk * kChunkBytes,
                   base + leaf_row >= 1 && base + leaf_row <= last);
      }
    }
    commit_copies();
  };

  // Pages are looked up well before the copies that need them.
  constexpr int kLookups = kStages < 5 ? 2 : 4;
  int pages[kLookups];
#pragma unroll
  for (int i = 0; i < kLookups; ++i) pages[i] = load_pages(i);
  const auto load_next = [&](int item) {
    load_leaf(item, pages[0]);
#pragma unroll
    for (int i = 0; i + 1 < kLookups; ++i) pages[i] = pages[i + 1];
    pages[kLookups - 1] = load_pages(item + kLookups);
  };

  const T* q_heads =
      static_cast<const T*>(params.q) + token * params.q_stride + kv_head * kGroupSize * kHeadDim;
  uint32_t q[kKSteps][4];
  float* all_own_slots = clusters > 1 ? in_block(own_slots, 0) : own_slots;
  float* all_first_slot = clusters > 1 ? in_block(first_slot, 0) : first_slot;
  const float scale_log2 = params.softmax_scale * kLog2e;
  const uint32_t matrix_row = lane / 16 * 8 + lane % 8;
  float lse[2][2];

  // One loop for all leaves and all that is done with them: these kernels run each line of code a
  // few times only, so that fetching instructions costs as much as executing them.
#pragma unroll 1
  for (int item = 1 - kStages; item <= my_leaves; ++item) {
    __syncwarp();  // every lane has read the stage that is loaded next
    load_next(item + kStages - 1);
    if (item < 0) {
      if (item == -1) {
        load_q<T>(q, q_heads, lane);
#pragma unroll 1
        for (int i = thread; i < kMaxPasses * kDigits; i += kThreads) {
          (&top_scratch.bins[0][0])[i] = 0;
        }
        if (clusters > 1) cluster_wait();  // every block of the cluster runs: it may be written to
      }
      continue;
    }

    // scores[n][i] is window lane / 4 + 8 (i / 2), head 8 n + 2 (lane % 4) + i % 2.
    float scores[2][4] = {};
    const bool is_coarse = item < my_coarse;
    if (item < my_leaves) {
      wait_copies<kStages - 1>();
      __syncwarp();
      const uint32_t stage = my_ring + item % kStages * kLeafBytes;
      float odd[2][4] = {};
#pragma unroll
      for (int step = 0; step < kKSteps; ++step) {
        uint32_t keys[4];
        ldmatrix_x4(keys, stage + swizzled(matrix_row, 2 * step + lane / 8 % 2));
        const uint32_t rows[4] = {keys[0], keys[2], keys[1], keys[3]};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          mma_16x8x16<T>(step % 2 ? odd[n] : scores[n], rows, q[step][n], q[step][n + 2]);
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = (scores[n][i] + odd[n][i]) * scale_log2;
      }
    }

    if (is_coarse) {
      const int leaf = coarse_begin + warp + item * kWarps;
      float peak[2][2];
      float sum[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = leaf * kLeafRows + lane / 4 + i / 2 * 8;
        const bool is_valid = slot >= 1 && slot <= num_coarse;
#pragma unroll
        for (int n = 0; n < 2; ++n) scores[n][i] = is_valid ? scores[n][i] : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        peak[i / 2][i % 2] = fmaxf(scores[i / 2][i % 2], scores[i / 2][i % 2 + 2]);
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& mine = peak[i / 2][i % 2];
          mine = fmaxf(mine, __shfl_xor_sync(kAllLanes, mine, offset));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float base = peak[i / 2][i % 2] == -INFINITY ? 0.0f : peak[i / 2][i % 2];
        sum[i / 2][i % 2] =
            exp2_approx(scores[i / 2][i % 2] - base) + exp2_approx(scores[i / 2][i % 2 + 2] - base);
      }
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[i / 2][i % 2] += __shfl_xor_sync(kAllLanes, sum[i / 2][i % 2], offset);
        }
      }
      // Lanes with the same heads share the blocks to write to.
      for (int target = lane / 4; target < clusters; target += kWarpSize / 4) {
        float2* remote = clusters > 1 ? in_block(leaves, target) : leaves;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int head = i / 2 * 8 + lane % 4 * 2 + i % 2;
          remote[head * layout.max_leaves + leaf] =
              make_float2(peak[i / 2][i % 2], sum[i / 2][i % 2]);
        }
      }
      continue;
    }

    if (item == my_coarse) {
      // All of K2 is done once every block has come here.
      if (clusters > 1) {
        cluster_arrive();
        cluster_wait();
      } else {
        __syncthreads();
      }
      constexpr int kHeadsPerWarp = kGroupSize / kWarps;
      float peak[kHeadsPerWarp], sum[kHeadsPerWarp] = {};
      const float2* my_parts = leaves + warp * kHeadsPerWarp * layout.max_leaves;
#pragma unroll
      for (int i = 0; i < kHeadsPerWarp; ++i) peak[i] = -INFINITY;
#pragma unroll 1
      for (int leaf = lane; leaf < num_coarse_leaves; leaf += kWarpSize) {
#pragma unroll
        for (int i = 0; i < kHeadsPerWarp; ++i) {
          peak[i] = fmaxf(peak[i], my_parts[i * layout.max_leaves + leaf].x);
        }
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
        for (int i = 0; i < kHeadsPerWarp; ++i) {
          peak[i] = fmaxf(peak[i], __shfl_xor_sync(kAllLanes, peak[i], offset));
        }
      }
#pragma unroll 1
      for (int leaf = lane; leaf < num_coarse_leaves; leaf += kWarpSize) {
#pragma unroll
        for (int i = 0; i < kHeadsPerWarp; ++i) {
          const float2 part = my_parts[i * layout.max_leaves + leaf];
          sum[i] += part.y * exp2_approx(part.x - peak[i]);
        }
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
        for (int i = 0; i < kHeadsPerWarp; ++i) {
          sum[i] += __shfl_xor_sync(kAllLanes, sum[i], offset);
        }
      }
      // Without a coarse window there are at most two blocks, and any constant ranks them alike.
      static_assert(kFineSlots == 4 && kCoarseSlots == 1, "see page_shift");
      static_assert(kHeadsPerWarp == 2, "two lanes write the normalisers of a warp");
      if (lane < kHeadsPerWarp) {
        const float mine =
            (lane == 0 ? peak[0] : peak[1]) + log2_approx(lane == 0 ? sum[0] : sum[1]);
        lse_log2[warp * kHeadsPerWarp + lane] = num_coarse > 0 ? mine : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        lse[i / 2][i % 2] = lse_log2[i / 2 * 8 + lane % 4 * 2 + i % 2];
      }
    }
    if (item == my_leaves) break;

    const int leaf = fine_begin + warp + (item - my_coarse) * kWarps;
    float window[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        scores[n][i] -= lse[n][i % 2];
        window[i / 2] = fmaxf(window[i / 2], scores[n][i]);
      }
    }
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        window[r] = fmaxf(window[r], __shfl_xor_sync(kAllLanes, window[r], offset));
      }
    }
    float total[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = (exp2_approx(scores[0][2 * r] - window[r]) +
                  exp2_approx(scores[0][2 * r + 1] - window[r])) +
                 (exp2_approx(scores[1][2 * r] - window[r]) +
                  exp2_approx(scores[1][2 * r + 1] - window[r]));
    }
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
#pragma unroll
      for (int r = 0; r < 2; ++r) total[r] += __shfl_xor_sync(kAllLanes, total[r], offset);
    }
    float best[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int slot = leaf * kLeafRows + lane / 4 + 8 * r;
      const bool is_valid = slot >= 1 && slot <= num_fine;
      window[r] = is_valid ? window[r] + log2_approx(total[r]) : -INFINITY;
      best[r] = window[r];
    }
#pragma unroll
    for (int offset = 4; offset <= 8; offset *= 2) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        best[r] = fmaxf(best[r], __shfl_xor_sync(kAllLanes, best[r], offset));
      }
    }
    if (lane % 16 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int block = leaf * kLeafBlocks + lane / 16 + 2 * r;
        if (block <= first_local) {
          all_own_slots[block] = best[r];
          all_first_slot[block] = window[r];
        }
      }
    }
  }

  if (clusters > 1) {
    cluster_arrive();
    if (rank == 0) cluster_wait();
  } else {
    __syncthreads();
  }
  if (rank == 0) {
    const int num_candidates = first_local - first_candidate;
    uint32_t* keys = reinterpret_cast<uint32_t*>(leaves);  // read for the last time above
    uint32_t least = 0xffffffffu;
    uint32_t largest = 0;
#pragma unroll 1
    for (int i = thread; i < num_candidates; i += kThreads) {
      const int block = first_candidate + i;
      const uint32_t key = ordered(fmaxf(own_slots[block], first_slot[block + 1]));
      keys[i] = key;
      least = min(least, key);
      largest = max(largest, key);
    }
    const int wanted = budget - first_candidate - params.local_blocks;
#pragma unroll 1
    for (int i = thread; i < first_candidate; i += kThreads) list[i] = i;
#pragma unroll 1
    for (int i = thread; i < params.local_blocks; i += kThreads) {
      list[budget - params.local_blocks + i] = first_local + i;
    }
    if (wanted > 0) {
      write_top(keys, num_candidates, wanted, least, largest, first_candidate, top_scratch,
                list + first_candidate);
    }
  }
  wait_for_previous_launch();
}

using Kernel = void (*)(SelectBlocksParams);

template <typename T>
Kernel kernel_with(int stages) {
  if (stages == 5) return select_blocks_kernel<T, 5>;
  if (stages == 3) return select_blocks_kernel<T, 3>;
  return select_blocks_kernel<T, 2>;
}

}  // namespace

Status select_blocks_decode(const SelectBlocksParams& params, const Device& device, void* stream) {
  const char* op = "select_blocks";

  // As many blocks a row as run side by side, with the deepest rings that allows.
  const int max_blocks = params.batch.max_blocks;
  const int64_t rows = int64_t{params.batch.num_tokens} * params.heads.num_kv_heads;
  const bool is_half = params.heads.dtype == kFloat16;
  LaunchShape shape;
  shape.threads = kThreads;
  shape.overlap = params.overlap != 0 && device.has_clusters();
  Kernel kernel = nullptr;
  int fits = 0;
  const bool may_share = device.has_clusters() && max_blocks > params.budget;
  for (shape.cluster = may_share ? kMaxCluster : 1;; shape.cluster /= 2) {
    for (const int stages : {5, 3, 2}) {
      const int bytes = Layout(stages, max_blocks).bytes();
      if (bytes + kStaticBytes > device.shared_bytes) continue;
      // Of more rows than fit side by side, two share a multiprocessor: deep rings forbid that.
      if (shape.cluster == 1 && kernel != nullptr && stages == 2) break;
      shape.shared_bytes = bytes;
      kernel = is_half ? kernel_with<__half>(stages) : kernel_with<__nv_bfloat16>(stages);
      const cudaError_t error = count_clusters(kernel, kThreads, bytes, shape.cluster, &fits);
      if (error != cudaSuccess) return launch_status(op, error);
      if (fits >= rows) break;
    }
    if (fits >= rows || shape.cluster == 1) break;
    kernel = nullptr;
  }
  Check check(op);
  check.require(
      kernel != nullptr, "max_blocks", std::to_string(max_blocks),
      "fewer: their scores need " + std::to_string(Layout(2, max_blocks).bytes() + kStaticBytes) +
          " bytes of shared memory and this GPU has " + std::to_string(device.shared_bytes));
  if (!check.ok()) return check.status();
  shape.grid = dim3(params.batch.num_tokens * shape.cluster, params.heads.num_kv_heads);
  return launch_status(op, launch(kernel, shape, stream, params));
}

}  // namespace cuda
}  // namespace minicpm41
