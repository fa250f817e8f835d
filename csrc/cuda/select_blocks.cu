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
#include "paged_kv.cuh"

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
static_assert(kDigits == kThreads, "a thread owns a bin of the histogram");
constexpr int kStaticBytes = 2048;  // at most, of the fixed shared arrays

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

// Block-wide exclusive sum of one value a thread; `total` is the sum of all.
__device__ __forceinline__ int exclusive_sum(int value, int* warp_sums, int* total) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  int all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    all += warp_sums[w];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

// Writes the `count` largest of keys[0, n) as ids first_id + index, ascending, ties to the lower
// id.
__device__ void write_top(const uint32_t* keys, int n, int count, int first_id, int32_t* out) {
  __shared__ int bins[kDigits];
  __shared__ int warp_sums[kWarps];
  __shared__ int chosen_bin, chosen_before, chosen_size;
  const int thread = threadIdx.x;

  // The digits of the smallest chosen key, from the top; `open` of the keys that begin with them
  // are chosen.
  uint32_t prefix = 0;
  uint32_t mask = 0;
  int open = count;
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    bins[thread] = 0;
    __syncthreads();
    for (int i = thread; i < n; i += kThreads) {
      const uint32_t key = keys[i];
      if ((key & mask) == prefix) atomicAdd(&bins[(key >> shift) & (kDigits - 1)], 1);
    }
    __syncthreads();
    const int digit = kDigits - 1 - thread;
    const int size = bins[digit];
    int total;
    const int before = exclusive_sum(size, warp_sums, &total);
    if (before < open && open <= before + size) {
      chosen_bin = digit;
      chosen_before = before;
      chosen_size = size;
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(chosen_bin) << shift;
    mask |= static_cast<uint32_t>(kDigits - 1) << shift;
    open -= chosen_before;
    if (chosen_size == open) break;
  }

  // Each thread owns a run of ids; one sum carries the counts above and at the threshold.
  constexpr int kEqualShift = 16;
  constexpr int kAboveMask = (1 << kEqualShift) - 1;
  const int run = (n + kThreads - 1) / kThreads;
  const int begin = min(thread * run, n);
  const int end = min(begin + run, n);
  int counts = 0;
  for (int i = begin; i < end; ++i) {
    const uint32_t digits = keys[i] & mask;
    counts += (digits > prefix) + ((digits == prefix) << kEqualShift);
  }
  int total;
  const int before = exclusive_sum(counts, warp_sums, &total);
  int equal_before = before >> kEqualShift;
  int place = (before & kAboveMask) + min(equal_before, open);
  for (int i = begin; i < end; ++i) {
    const uint32_t digits = keys[i] & mask;
    const bool is_equal = digits == prefix;
    if (digits > prefix || (is_equal && equal_before < open)) out[place++] = first_id + i;
    equal_before += is_equal;
  }
}

template <typename T, int kStages>
__global__ void __launch_bounds__(kThreads, 2)
    select_blocks_kernel(const SelectBlocksParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float lse_log2[kGroupSize];
  const Layout layout(kStages, params.batch.max_blocks);
  unsigned char* ring = shared;
  // [max_leaves, kGroupSize]: maximum and sum of each leaf of K2, complete in every block.
  float2* leaves = reinterpret_cast<float2*>(shared + layout.ring_bytes);
  // Complete in the cluster's first block: largest score of a block's own slots, score of its
  // first.
  float* own_slots = reinterpret_cast<float*>(leaves + layout.max_leaves * kGroupSize);
  float* first_slot = own_slots + layout.max_blocks + 1;

  allow_next_launch();
  const int clusters = cluster_size();
  const int rank = cluster_rank();
  const int token = blockIdx.x / clusters;
  const int kv_head = blockIdx.y;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;

  QueryRow row;
  if (!load_query_row(params.batch, token, &row)) {
    wait_for_previous_launch();
    return;
  }
  const int own = row.position / kBlockSize;
  const int budget = params.budget;
  int32_t* list = params.topk_idx + (int64_t{kv_head} * params.batch.num_tokens + token) * budget;
  if (own + 1 <= budget || row.position + 1 < params.dense_len) {
    if (rank == 0) {
      for (int i = thread; i < budget; i += kThreads) list[i] = i <= own ? i : -1;
    }
    wait_for_previous_launch();
    return;
  }
  if (clusters > 1) cluster_arrive();
  touch_table(row.pages, own + 1);

  // Candidates are blocks [first_candidate, first_local); the first local block only lends its
  // first slot to the candidate before it.
  const int first_candidate = params.init_blocks;
  const int first_local = own - params.local_blocks + 1;
  const int num_fine = max(0, (row.position + 1) / kKernelStride - 1);
  const int num_coarse = max(0, (row.position + 1) / kCoarseKernelStride - 1);
  const int num_coarse_leaves = (num_coarse + kLeafRows) / kLeafRows;
  const int coarse_begin = rank * num_coarse_leaves / clusters;
  const int coarse_end = (rank + 1) * num_coarse_leaves / clusters;
  const int fine_base = first_candidate / kLeafBlocks;
  const int num_fine_leaves = first_local / kLeafBlocks + 1 - fine_base;
  const int fine_begin = fine_base + rank * num_fine_leaves / clusters;
  const int fine_end = fine_base + (rank + 1) * num_fine_leaves / clusters;

  // Windows that this very step completes come from the previous launch: of a single token the last
  // coarse one alone counts here, if any, for its last fine one overlaps only local blocks.
  if (row.query_len > 1 || params.local_blocks < 2) wait_for_previous_launch();
  const bool last_is_new = (row.position + 1) % kCoarseKernelStride == 0;

  // The warp's leaves, coarse ones first.
  const int my_coarse = max(0, (coarse_end - coarse_begin - warp + kWarps - 1) / kWarps);
  const int my_fine = max(0, (fine_end - fine_begin - warp + kWarps - 1) / kWarps);
  const int my_leaves = my_coarse + my_fine;
  const int kv_heads = params.heads.num_kv_heads;
  const T* k1_cache = static_cast<const T*>(params.k1_cache);
  const T* k2_cache = static_cast<const T*>(params.k2_cache);
  unsigned char* my_ring = ring + warp * kStages * kLeafBytes;
  const uint32_t my_ring_address = shared_address(my_ring);
  const int copy_row = lane / kRowChunks;  // and every second row after it
  const int copy_chunk_id = lane % kRowChunks;

  const auto load_leaf = [&](int item) {
    if (item < my_leaves) {
      const uint32_t stage = my_ring_address + item % kStages * kLeafBytes;
      const bool is_coarse = item < my_coarse;
      const T* source[kLeafRows / 2];
      if (is_coarse) {
        const int base = (coarse_begin + warp + item * kWarps) * kLeafRows;
        if (last_is_new && base <= num_coarse && num_coarse < base + kLeafRows) {
          wait_for_previous_launch();
        }
#pragma unroll
        for (int i = 0; i < kLeafRows / 2; ++i) {
          const int slot = base + copy_row + 2 * i;
          const bool is_valid = slot >= 1 && slot <= num_coarse;
          source[i] = is_valid
                          ? slot_row<kCoarseSlots>(k2_cache, row.pages[slot], kv_heads, kv_head, 0)
                          : nullptr;
        }
      } else {
        const int base = (fine_begin + warp + (item - my_coarse) * kWarps) * kLeafRows;
#pragma unroll
        for (int i = 0; i < kLeafRows / 2; ++i) {
          const int slot = base + copy_row + 2 * i;
          const bool is_valid = slot >= 1 && slot <= num_fine;
          source[i] = is_valid ? slot_row<kFineSlots>(k1_cache, row.pages[slot / kFineSlots],
                                                      kv_heads, kv_head, slot % kFineSlots)
                               : nullptr;
        }
      }
#pragma unroll
      for (int i = 0; i < kLeafRows / 2; ++i) {
        const bool is_valid = source[i] != nullptr;
        copy_chunk(stage + swizzled(copy_row + 2 * i, copy_chunk_id),
                   is_valid ? source[i] + copy_chunk_id * 8 : k1_cache, is_valid);
      }
    }
    commit_copies();
  };

#pragma unroll
  for (int item = 0; item < kStages - 1; ++item) load_leaf(item);

  uint32_t q[kKSteps][4];
  load_q<T>(
      q,
      static_cast<const T*>(params.q) + token * params.q_stride + kv_head * kGroupSize * kHeadDim,
      lane);

  // Scores of the next leaf: head lane / 4 (and + 8), window 8 n + 2 (lane % 4) (and + 1).
  const auto score_leaf = [&](int item, float (&scores)[2][4]) {
    __syncwarp();  // every lane has read the stage that is loaded next
    load_leaf(item + kStages - 1);
    wait_copies<kStages - 1>();
    __syncwarp();
    const uint32_t stage = my_ring_address + item % kStages * kLeafBytes;
    float odd[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kKSteps; ++step) {
      uint32_t keys[4];
      ldmatrix_x4(keys, stage + swizzled(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma_16x8x16<T>(step % 2 ? odd[n] : scores[n], q[step], keys[2 * n], keys[2 * n + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] += odd[n][i];
    }
  };

  const float scale_log2 = params.softmax_scale * kLog2e;
  if (clusters > 1) cluster_wait();  // every block of the cluster runs: its memory may be written
  for (int item = 0; item < my_coarse; ++item) {
    float scores[2][4];
    score_leaf(item, scores);
    const int leaf = coarse_begin + warp + item * kWarps;
    float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = leaf * kLeafRows + n * 8 + lane % 4 * 2 + i % 2;
        const bool is_valid = slot >= 1 && slot <= num_coarse;
        scores[n][i] = is_valid ? scores[n][i] * scale_log2 : -INFINITY;
        peak[i / 2] = fmaxf(peak[i / 2], scores[n][i]);
      }
    }
    float sum[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAllLanes, peak[r], 1));
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAllLanes, peak[r], 2));
      const float base = peak[r] == -INFINITY ? 0.0f : peak[r];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        sum[r] += exp2_approx(scores[n][2 * r] - base) + exp2_approx(scores[n][2 * r + 1] - base);
      }
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
    }
    // The four lanes of a head share the blocks to write to.
    for (int target = lane % 4; target < clusters; target += 4) {
      float2* remote = clusters > 1 ? in_block(leaves, target) : leaves;
      remote[leaf * kGroupSize + lane / 4] = make_float2(peak[0], sum[0]);
      remote[leaf * kGroupSize + lane / 4 + 8] = make_float2(peak[1], sum[1]);
    }
  }
  if (clusters > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  constexpr int kHeadsPerWarp = kGroupSize / kWarps;
#pragma unroll
  for (int i = 0; i < kHeadsPerWarp; ++i) {
    const int head = warp * kHeadsPerWarp + i;
    float peak = -INFINITY;
    for (int leaf = lane; leaf < num_coarse_leaves; leaf += kWarpSize) {
      peak = fmaxf(peak, leaves[leaf * kGroupSize + head].x);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, offset));
    }
    float sum = 0.0f;
    for (int leaf = lane; leaf < num_coarse_leaves; leaf += kWarpSize) {
      const float2 part = leaves[leaf * kGroupSize + head];
      sum += part.y * exp2f(part.x - peak);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    // Without a coarse window there are at most two blocks, and any constant ranks them alike.
    if (lane == 0) lse_log2[head] = num_coarse > 0 ? peak + log2f(sum) : 0.0f;
  }
  __syncthreads();
  const float lse[2] = {lse_log2[lane / 4], lse_log2[lane / 4 + 8]};

  float* all_own_slots = clusters > 1 ? in_block(own_slots, 0) : own_slots;
  float* all_first_slot = clusters > 1 ? in_block(first_slot, 0) : first_slot;
  for (int item = my_coarse; item < my_leaves; ++item) {
    float scores[2][4];
    score_leaf(item, scores);
    const int leaf = fine_begin + warp + (item - my_coarse) * kWarps;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float window[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float x = scores[n][c] * scale_log2 - lse[0];
        const float y = scores[n][c + 2] * scale_log2 - lse[1];
        float peak = fmaxf(x, y);
#pragma unroll
        for (int offset = 4; offset < kWarpSize; offset *= 2) {
          peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, offset));
        }
        float sum = exp2_approx(x - peak) + exp2_approx(y - peak);
#pragma unroll
        for (int offset = 4; offset < kWarpSize; offset *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, offset);
        }
        const int slot = leaf * kLeafRows + n * 8 + lane % 4 * 2 + c;
        const bool is_valid = slot >= 1 && slot <= num_fine;
        window[c] = is_valid ? peak + log2f(sum) : -INFINITY;
      }
      float best = fmaxf(window[0], window[1]);
      best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 1));
      const int block = leaf * kLeafBlocks + 2 * n + lane % 4 / 2;
      if (lane < 4 && lane % 2 == 0 && block <= first_local) {
        all_own_slots[block] = best;
        all_first_slot[block] = window[0];
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
    for (int i = thread; i < num_candidates; i += kThreads) {
      const int block = first_candidate + i;
      keys[i] = ordered(fmaxf(own_slots[block], first_slot[block + 1]));
    }
    __syncthreads();
    const int forced = first_candidate + params.local_blocks;
    const int wanted = budget - forced;
    for (int i = thread; i < first_candidate; i += kThreads) list[i] = i;
    for (int i = thread; i < params.local_blocks; i += kThreads) {
      list[budget - params.local_blocks + i] = first_local + i;
    }
    if (wanted > 0) {
      write_top(keys, num_candidates, wanted, first_candidate, list + first_candidate);
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

int64_t select_blocks_workspace(const SelectBlocksParams&) { return 0; }

Status run_select_blocks(const SelectBlocksParams& params, void* stream) {
  const char* op = "select_blocks";
  Status status = validate(params);
  if (!status.ok()) return status;
  Device device;
  status = check_geometry(op, params.heads, &device);
  if (!status.ok() || params.batch.num_tokens == 0) return status;

  // Few rows: many blocks a row, each with deep rings. Many rows: two blocks a multiprocessor.
  constexpr int kBlocksWanted = 128;
  const int rows = params.batch.num_tokens * params.heads.num_kv_heads;
  int cluster = 1;
  if (device.has_clusters() && params.batch.max_blocks > params.budget) {
    while (cluster < kMaxCluster && 2 * cluster * rows <= kBlocksWanted) cluster *= 2;
  }
  int stages = cluster * rows <= kBlocksWanted ? 5 : 3;
  if (Layout(stages, params.batch.max_blocks).bytes() + kStaticBytes > device.shared_bytes) {
    stages = 3;
  }
  if (Layout(stages, params.batch.max_blocks).bytes() + kStaticBytes > device.shared_bytes) {
    stages = 2;
  }
  const int shared_bytes = Layout(stages, params.batch.max_blocks).bytes();
  Check check(op);
  check.require(shared_bytes + kStaticBytes <= device.shared_bytes, "max_blocks",
                std::to_string(params.batch.max_blocks),
                "fewer: its scores need " + std::to_string(shared_bytes + kStaticBytes) +
                    " bytes of shared memory and this GPU has " +
                    std::to_string(device.shared_bytes));
  if (!check.ok()) return check.status();

  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = shared_bytes;
  shape.overlap = params.overlap != 0 && device.has_clusters();
  const Kernel kernel = params.heads.dtype == kFloat16 ? kernel_with<__half>(stages)
                                                       : kernel_with<__nv_bfloat16>(stages);
  cudaError_t error = fit_cluster(kernel, &shape, cluster,
                                  dim3(params.batch.num_tokens, params.heads.num_kv_heads));
  if (error == cudaSuccess) error = launch(kernel, shape, stream, params);
  return launch_status(op, error);
}

}  // namespace cuda
}  // namespace minicpm41
