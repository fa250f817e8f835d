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
#include "barriers.cuh"
#include "prefill.h"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr int kFewWarps = 8;
constexpr int kMaxWarps = 16;
// Leaves in a warp's ring: a row that few rows share the GPU with brings most of its share at once.
constexpr int kFewStages = 2;
constexpr int kMaxStages = 3;
constexpr int kLeafRows = 16;
constexpr int kLeafBytes = kLeafRows * kRowBytes;
constexpr int kLeafBlocks = kLeafRows / kFineSlots;
constexpr int kMaxCluster = 16;
// Between the parts of two leaves, in float2: every head's, and room that spreads them over banks.
constexpr int kPartStride = kGroupSize + 2;
constexpr int kBins = 256;
constexpr int kStaticBytes = 6 * 1024;  // at most, of the fixed shared arrays

// A float as an integer of the same order, and back.
__device__ __forceinline__ uint32_t ordered(float score) {
  const uint32_t bits = __float_as_uint(score);
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu));
}

// Sizes of the dynamic shared memory, in the order it is laid out.
struct Layout {
  int ring_bytes;
  int max_leaves;  // of K2
  int max_blocks;
  __host__ __device__ Layout(int warps, int stages, int blocks)
      : ring_bytes(stages * warps * kLeafBytes),
        max_leaves(blocks / kLeafRows + 1),
        max_blocks(blocks) {}
  // Scores of each kind, whole leaves of K1.
  __host__ __device__ int slots() const { return (max_blocks / kLeafBlocks + 1) * kLeafBlocks; }
  __host__ __device__ int bytes() const {
    return ring_bytes + max_leaves * kPartStride * static_cast<int>(sizeof(float2)) +
           2 * slots() * static_cast<int>(sizeof(float));
  }
};

// Scratch of write_top; all of it must be 0 before.
struct TopScratch {
  int bins[kBins];  // scores from the largest down
  int num_members;  // of the bin that the smallest chosen score is in
  uint32_t warp_least[kMaxWarps];
  uint32_t warp_largest[kMaxWarps];
};

// Writes the `count` largest of scores[0, n) as ids first_id + index, ascending, ties to the lower
// id; 0 < count < n. `least` and `largest` bound the thread's own share of the scores. `members`
// has room for n ids, `chosen` for n bits and 255 more.
template <int kWarps>
__device__ __forceinline__ void write_top(const float* scores, int n, int count, uint32_t least,
                                          uint32_t largest, int first_id, TopScratch& scratch,
                                          int32_t* members, uint32_t* chosen, int32_t* out) {
  constexpr int kThreads = kWarps * kWarpSize;
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
  if (least == largest) {
    for (int i = thread; i < count; i += kThreads) out[i] = first_id + i;
    return;
  }

  // Bins of equal width tell all scores apart but the few that share one with the smallest chosen.
  const float base = from_ordered(least);
  const float scale = kBins / (from_ordered(largest) - base);
  const auto bin_of = [&](float score) {
    return kBins - 1 - min(kBins - 1, static_cast<int>((score - base) * scale));
  };
#pragma unroll 4
  for (int i = thread; i < n; i += kThreads) atomicAdd(&scratch.bins[bin_of(scores[i])], 1);
  __syncthreads();

  // Every warp finds the bin of the smallest chosen score for itself, and how many of it are
  // chosen.
  constexpr int kLaneBins = kBins / kWarpSize;
  int sizes[kLaneBins];
  int before = 0;
#pragma unroll
  for (int i = 0; i < kLaneBins; ++i) {
    sizes[i] = scratch.bins[lane * kLaneBins + i];
    before += sizes[i];
  }
  const int sum = before;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += other;
  }
  before -= sum;
  const int holder = __ffs(__ballot_sync(kAllLanes, count <= before + sum)) - 1;
  int bin = 0;
  int open = 0;
#pragma unroll
  for (int i = 0; i < kLaneBins; ++i) {
    if (before < count) {
      bin = lane * kLaneBins + i;
      open = count - before;
    }
    before += sizes[i];
  }
  bin = __shfl_sync(kAllLanes, bin, holder);
  open = __shfl_sync(kAllLanes, open, holder);

#pragma unroll 2
  for (int first = warp * kWarpSize; first < n; first += kThreads) {
    const int i = first + lane;
    const int mine = i < n ? bin_of(scores[i]) : kBins;
    const uint32_t above = __ballot_sync(kAllLanes, mine < bin);
    if (lane == 0) chosen[first / kWarpSize] = above;
    if (mine == bin) members[atomicAdd(&scratch.num_members, 1)] = i;
  }
  __syncthreads();
  // Members of that bin are ranked by every warp for itself where a warp holds them.
  const int num_members = scratch.num_members;
  const bool is_few = num_members <= kWarpSize;
  int member = -1;
  uint32_t picked = 0;
  if (is_few) {
    float score = 0.0f;
    if (lane < num_members) {
      member = members[lane];
      score = scores[member];
    }
    int rank = 0;
    if (open < num_members) {
#pragma unroll 1
      for (int j = 0; j < num_members; ++j) {
        const int other = __shfl_sync(kAllLanes, member, j);
        const float other_score = __shfl_sync(kAllLanes, score, j);
        rank += other_score > score || (other_score == score && other < member);
      }
    }
    picked = __ballot_sync(kAllLanes, member >= 0 && rank < open);
  } else {
#pragma unroll 1
    for (int k = thread; k < num_members; k += kThreads) {
      const int id = members[k];
      const float score = scores[id];
      int rank = 0;
#pragma unroll 1
      for (int j = 0; j < num_members; ++j) {
        const int other = members[j];
        rank += scores[other] > score || (scores[other] == score && other < id);
      }
      if (rank < open) atomicOr(&chosen[id / kWarpSize], 1u << id % kWarpSize);
    }
    __syncthreads();
  }

  // Every warp counts all words of 32 ids and writes every eighth.
  int begin = 0;
#pragma unroll 1
  for (int first = 0; first * kWarpSize < n; first += kWarpSize) {
    uint32_t word = (first + lane) * kWarpSize < n ? chosen[first + lane] : 0;
#pragma unroll 1
    for (uint32_t rest = picked; rest != 0; rest &= rest - 1) {
      const int id = __shfl_sync(kAllLanes, member, __ffs(rest) - 1);
      if (id / kWarpSize == first + lane) word |= 1u << id % kWarpSize;
    }
    const int size = __popc(word);
#pragma unroll
    for (int i = 0; i < kWarpSize / kWarps; ++i) {
      const int source = i * kWarps + warp;
      const uint32_t bits = __shfl_sync(kAllLanes, word, source);
      const int at = begin + __reduce_add_sync(kAllLanes, lane < source ? size : 0);
      if (bits >> lane & 1) {
        out[at + __popc(bits & ((1u << lane) - 1))] =
            first_id + (first + source) * kWarpSize + lane;
      }
    }
    begin += __reduce_add_sync(kAllLanes, size);
  }
}

template <typename T, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps* kWarpSize, 1)
    select_blocks_kernel(const __grid_constant__ SelectBlocksParams params, const bool by_request) {
  constexpr int kThreads = kWarps * kWarpSize;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float lse_log2[kGroupSize];
  __shared__ __align__(16) TopScratch top_scratch;
  const Layout layout(kWarps, kStages, params.batch.max_blocks);
  // [max_leaves, kPartStride]: maximum and sum of each leaf of K2, complete in every block.
  float2* leaves = reinterpret_cast<float2*>(shared + layout.ring_bytes);
  // Complete in the cluster's first block: largest score of a block's own slots, and of its first.
  float* own_slots = reinterpret_cast<float*>(leaves + layout.max_leaves * kPartStride);
  float* first_slot = own_slots + layout.slots();

  allow_next_launch();
  const int clusters = cluster_size();
  const int rank = cluster_rank();
  const int cluster_log2 = __ffs(clusters) - 1;  // clusters are powers of two
  const int token = token_of_row(params.batch, blockIdx.x >> cluster_log2, by_request);
  const int kv_head = blockIdx.y;
  // One block waits for the previous launch on behalf of all, so that this one does not end before.
  const bool is_first = blockIdx.x == 0 && kv_head == 0;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;

  // The table of the request that it most likely is, while the row is looked up.
  if (kStages > kFewStages && token >= 0) {
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

  // Every block of a cluster is sent all of K2, the first one all scores.
  __shared__ uint64_t has_coarse;
  __shared__ uint64_t has_scores;
  if (clusters > 1) {
    if (thread == 0) {
      init_barrier(&has_coarse, 1);
      init_barrier(&has_scores, 1);
      publish_barriers();
      arrive_expecting(&has_coarse,
                       num_coarse_leaves * kGroupSize * static_cast<int>(sizeof(float2)));
      arrive_expecting(&has_scores, num_fine_leaves * 2 * static_cast<int>(sizeof(float4)));
    }
    cluster_arrive();
  }

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

  // Pages are looked up well before the copies that need them, 32 at once, one a lane: of two
  // coarse leaves, a page for each row, or of eight fine ones, a page for every four rows.
  constexpr int kLookups = 2;
  const int coarse_lookups = (my_coarse + 1) / 2;
  const auto look_up = [&](int number) {
    const bool is_coarse = number < coarse_lookups;
    const int shift = is_coarse ? 4 : 2;  // log2 of the pages of a leaf
    const int first_item = is_coarse ? 2 * number : my_coarse + 8 * (number - coarse_lookups);
    const int item = first_item + (lane >> shift);
    const int block = (first_row_of(item) >> (is_coarse ? 0 : 2)) + (lane & ((1 << shift) - 1));
    const bool is_valid = item < (is_coarse ? my_coarse : my_leaves) &&
                          block <= (is_coarse ? num_coarse : num_fine / kFineSlots);
    return is_valid ? __ldg(row.pages + block) : 0;
  };
  int pages[kLookups];
#pragma unroll
  for (int i = 0; i < kLookups; ++i) pages[i] = look_up(i);
  // Rows without a window are copied like the others, and their scores masked.
  const int64_t k1_page = int64_t{kv_heads} * kFineSlots * kRowBytes;
  const int64_t k2_page = int64_t{kv_heads} * kCoarseSlots * kRowBytes;
  const char* k1 = static_cast<const char*>(params.k1_cache) +
                   (kv_head * kFineSlots + copy_row) * kRowBytes + chunk * kChunkBytes;
  const char* k2 = static_cast<const char*>(params.k2_cache) + kv_head * kCoarseSlots * kRowBytes +
                   chunk * kChunkBytes;
  const auto load_leaf = [&](int item) {
    if (item < my_leaves) {
      const uint32_t stage = my_ring + item % kStages * kLeafBytes;
      const bool is_coarse = item < my_coarse;
      const int nth = is_coarse ? item & 1 : (item - my_coarse) & 7;  // of its lookup
      if (is_coarse) {
        const int base = first_row_of(item);
        if (last_is_new && base <= num_coarse && num_coarse < base + kLeafRows) {
          wait_for_previous_launch();
        }
#pragma unroll
        for (int i = 0; i < kLeafRows; i += 2) {
          const int page = __shfl_sync(kAllLanes, pages[0], nth * kLeafRows + copy_row + i);
          copy_chunk(stage + swizzled(copy_row + i, chunk), k2 + page * k2_page, true);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kLeafBlocks; ++i) {
          const int page = __shfl_sync(kAllLanes, pages[0], nth * kLeafBlocks + i);
          const int first = i * kFineSlots + copy_row;
          copy_chunk(stage + swizzled(first, chunk), k1 + page * k1_page, true);
          copy_chunk(stage + swizzled(first + 2, chunk), k1 + page * k1_page + 2 * kRowBytes, true);
        }
      }
      if (nth == (is_coarse ? 1 : 7) || item + 1 == my_coarse) {
#pragma unroll
        for (int i = 0; i + 1 < kLookups; ++i) pages[i] = pages[i + 1];
        pages[kLookups - 1] =
            look_up(kLookups + (is_coarse ? item / 2 : coarse_lookups + (item - my_coarse) / 8));
      }
    }
    commit_copies();
  };

  const T* q_heads =
      static_cast<const T*>(params.q) + token * params.q_stride + kv_head * kGroupSize * kHeadDim;
  uint32_t q[kKSteps][4];
  const float scale_log2 = params.softmax_scale * kLog2e;
  const uint32_t matrix_row = lane / 16 * 8 + lane % 8;
  float lse[2][2];

  // One loop for all leaves and all that is done with them: these kernels run each line of code a
  // few times only, so that fetching instructions costs as much as executing them.
#pragma unroll 1
  for (int item = -1; item <= my_leaves; ++item) {
    __syncwarp();  // every lane has read the stage that is loaded next
    int next = item < 0 ? 0 : item + kStages - 1;
#pragma unroll 1
    do {
      load_leaf(next);
    } while (++next < item + kStages);
    if (item < 0) {
      load_q<T>(q, q_heads, lane);
#pragma unroll 1
      for (int i = thread; i < static_cast<int>(sizeof(TopScratch) / sizeof(int)); i += kThreads) {
        reinterpret_cast<int*>(&top_scratch)[i] = 0;
      }
      if (clusters > 1) cluster_wait();  // every block of the cluster runs: it may be written to
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
      // Of heads 8 n + 2 (lane % 4) and + 1.
      float2* part = leaves + leaf * kPartStride + lane % 4 * 2;
      float4 pair[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        pair[n] = make_float4(peak[n][0], sum[n][0], peak[n][1], sum[n][1]);
      }
      if (clusters > 1) {
        // Lanes with the same heads share the blocks to send to.
#pragma unroll 1
        for (int target = lane / 4; target < clusters; target += kWarpSize / 4) {
          const uint32_t remote = address_in_block(part, target);
          const uint32_t barrier = address_in_block(&has_coarse, target);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            send(remote + n * 8 * static_cast<uint32_t>(sizeof(float2)), barrier, pair[n]);
          }
        }
      } else if (lane < 4) {
#pragma unroll
        for (int n = 0; n < 2; ++n) *reinterpret_cast<float4*>(part + 8 * n) = pair[n];
      }
      continue;
    }

    if (item == my_coarse) {
      // All of K2 is done once every block has come here.
      if (clusters > 1) {
        wait_phase(&has_coarse, 0);
      } else {
        __syncthreads();
      }
      constexpr int kHeadsPerWarp = kGroupSize / kWarps;
      float peak[kHeadsPerWarp], sum[kHeadsPerWarp] = {};
      const float2* my_parts = leaves + warp * kHeadsPerWarp;
#pragma unroll
      for (int i = 0; i < kHeadsPerWarp; ++i) peak[i] = -INFINITY;
#pragma unroll 1
      for (int leaf = lane; leaf < num_coarse_leaves; leaf += kWarpSize) {
#pragma unroll
        for (int i = 0; i < kHeadsPerWarp; ++i) {
          peak[i] = fmaxf(peak[i], my_parts[leaf * kPartStride + i].x);
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
          const float2 part = my_parts[leaf * kPartStride + i];
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
#pragma unroll
      for (int i = 0; i < kHeadsPerWarp; ++i) {
        const float mine = peak[i] + log2_approx(sum[i]);
        if (lane == i) lse_log2[warp * kHeadsPerWarp + i] = num_coarse > 0 ? mine : 0.0f;
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
    // Lane 0 has blocks 0 and 2 of the leaf, lane 16 blocks 1 and 3; one sends what counts for a
    // block itself, the other what counts for the one before.
    float mine[2], other[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mine[r] = lane == 0 ? best[r] : window[r];
      other[r] = __shfl_xor_sync(kAllLanes, lane == 0 ? window[r] : best[r], 16);
    }
    if (lane % 16 == 0) {
      const float4 values = lane == 0 ? make_float4(mine[0], other[0], mine[1], other[1])
                                      : make_float4(other[0], mine[0], other[1], mine[1]);
      float* target = (lane == 0 ? own_slots : first_slot) + leaf * kLeafBlocks;
      if (clusters > 1) {
        send(address_in_block(target, 0), address_in_block(&has_scores, 0), values);
      } else {
        *reinterpret_cast<float4*>(target) = values;
      }
    }
  }

  if (clusters > 1 && rank == 0) {
    wait_phase(&has_scores, 0);
    __syncthreads();  // all warps have read the leaves for the last time
  } else if (clusters == 1) {
    __syncthreads();
  }
  if (rank == 0) {
    const int num_candidates = first_local - first_candidate;
    float* scores = reinterpret_cast<float*>(leaves);
    uint32_t least = 0xffffffffu;
    uint32_t largest = 0;
#pragma unroll 4
    for (int i = thread; i < num_candidates; i += kThreads) {
      const int block = first_candidate + i;
      // Of NaN nothing is chosen first, and the bins hold no infinity.
      const float score = fmaxf(fmaxf(own_slots[block], first_slot[block + 1]), -3.4e38f) + 0.0f;
      scores[i] = score;
      const uint32_t key = ordered(score);
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
      write_top<kWarps>(scores, num_candidates, wanted, least, largest, first_candidate,
                        top_scratch, reinterpret_cast<int32_t*>(scores + layout.max_blocks),
                        reinterpret_cast<uint32_t*>(own_slots), list + first_candidate);
    }
  }
  if (is_first) wait_for_previous_launch();
}

// Where no table is wider than the budget: each list names all blocks of its row.
constexpr int kListThreads = 3 * kWarpSize;
__global__ void __launch_bounds__(kListThreads)
    list_all_blocks_kernel(const __grid_constant__ SelectBlocksParams params,
                           const bool by_request) {
  allow_next_launch();
  const int token = token_of_row(params.batch, blockIdx.x, by_request);
  const int kv_head = blockIdx.y;
  QueryRow row;
  if (token >= 0 && load_query_row(params.batch, token, &row) && !is_prefill(row.query_len)) {
    const int own = row.position / kBlockSize;
    int32_t* list =
        params.topk_idx + (int64_t{kv_head} * params.batch.num_tokens + token) * params.budget;
#pragma unroll 1
    for (int i = threadIdx.x; i < params.budget; i += kListThreads) list[i] = i <= own ? i : -1;
  }
  // On behalf of all, so that this launch does not end before the previous one.
  if (blockIdx.x + blockIdx.y == 0) wait_for_previous_launch();
}

}  // namespace

Status select_blocks_decode(const SelectBlocksParams& params, const Device& device, void* stream) {
  const char* op = "select_blocks";

  const int max_blocks = params.batch.max_blocks;
  const DecodeRows row_grid(params.batch);
  const int64_t rows = int64_t{row_grid.count} * params.heads.num_kv_heads;
  LaunchShape shape;
  shape.overlap = params.overlap != 0 && device.has_clusters();
  if (max_blocks <= params.budget) {
    shape.threads = kListThreads;
    shape.grid = dim3(row_grid.count, params.heads.num_kv_heads);
    return launch_status(
        op, launch(list_all_blocks_kernel, shape, stream, params, row_grid.by_request));
  }
  if (device.has_clusters()) {
    // Half of the multiprocessors: sparse_attention begins on the others.
    while (shape.cluster < kMaxCluster && 2 * shape.cluster * rows <= device.multiprocessors / 2) {
      shape.cluster *= 2;
    }
  }
  // Blocks are small where a row has many of them, or where the others do not fit.
  const auto bytes = [&](int warps, int stages) {
    return Layout(warps, stages, max_blocks).bytes() + kStaticBytes;
  };
  const bool is_few =
      shape.cluster == kMaxCluster && bytes(kFewWarps, kMaxStages) <= device.shared_bytes;
  const bool is_small =
      shape.cluster == kMaxCluster || bytes(kMaxWarps, kFewStages) > device.shared_bytes;
  const int warps = is_small ? kFewWarps : kMaxWarps;
  const int stages = is_few ? kMaxStages : kFewStages;
  Check check(op);
  check.require(
      bytes(warps, stages) <= device.shared_bytes, "max_blocks", std::to_string(max_blocks),
      "fewer: their scores need " + std::to_string(bytes(warps, stages)) +
          " bytes of shared memory and this GPU has " + std::to_string(device.shared_bytes));
  if (!check.ok()) return check.status();
  using Bf16 = __nv_bfloat16;
  const bool is_half = params.heads.dtype == kFloat16;
  const auto few = is_half ? select_blocks_kernel<__half, kFewWarps, kMaxStages>
                           : select_blocks_kernel<Bf16, kFewWarps, kMaxStages>;
  const auto small = is_half ? select_blocks_kernel<__half, kFewWarps, kFewStages>
                             : select_blocks_kernel<Bf16, kFewWarps, kFewStages>;
  const auto large = is_half ? select_blocks_kernel<__half, kMaxWarps, kFewStages>
                             : select_blocks_kernel<Bf16, kMaxWarps, kFewStages>;
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
