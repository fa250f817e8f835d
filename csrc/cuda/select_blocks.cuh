// How a cluster makes the list of one row: log-sum-exp over K2, scores over K1, pooling, top-k.
//
// A warp takes 16 windows at a time, a leaf, through its own ring of copies, so warps do not wait
// for each other before the normaliser. The bits of a leaf and the order in which leaves are merged
// depend on the row alone, never on how many blocks share it.
//
// A window is stored in the page of its last key. So flat slot u = 4 * page + slot holds window u -
// 1, page b holds coarse window b - 1, and the five windows that overlap block b are the four slots
// of its page and the first slot of the next.
#pragma once

#include "barriers.cuh"
#include "prefill.h"

namespace minicpm41 {
namespace cuda {

constexpr int kFewWarps = 8;
constexpr int kMaxWarps = 16;
// Leaves in a warp's ring: a row that few rows share the GPU with brings most of its share at once.
constexpr int kFewLeaves = 2;
constexpr int kMaxLeaves = 3;
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
struct SelectLayout {
  int ring_bytes;
  int max_leaves;  // of K2
  int max_blocks;
  __host__ __device__ SelectLayout(int warps, int stages, int blocks)
      : ring_bytes(stages * warps * kLeafBytes),
        max_leaves(blocks / kLeafRows + 1),
        max_blocks(blocks) {}
  // Scores of each kind, whole leaves of K1.
  __host__ __device__ int slots() const { return (max_blocks / kLeafBlocks + 1) * kLeafBlocks; }
  __host__ __device__ int bytes() const { return ring_bytes + score_bytes(); }
  __host__ __device__ int score_bytes() const {
    return max_leaves * kPartStride * static_cast<int>(sizeof(float2)) +
           2 * slots() * static_cast<int>(sizeof(float));
  }
};

// Of a whole step, select_row is the work of the warps that compute, beside others in their block.
constexpr int kSelectBarrier = 3;
template <int kWarps, bool kIsStep>
__device__ __forceinline__ void sync_select() {
  if constexpr (kIsStep) {
    sync_named(kSelectBarrier, kWarps * kWarpSize);
  } else {
    __syncthreads();
  }
}

// Scratch of write_top; all of it must be 0 before.
struct TopScratch {
  int bins[kBins];  // scores from the largest down
  int num_members;  // of the bin that the smallest chosen score is in
  uint32_t warp_least[kMaxWarps];
  uint32_t warp_largest[kMaxWarps];
  uint2 words[kWarpSize];  // a bit a candidate, of write_top_of_many
};

// Writes the `count` largest of scores[0, n) as ids first_id + index, ascending, ties to the lower
// id; 0 < count < n. `least` and `largest` bound the thread's own share of the scores. `members`
// has room for n ids, `chosen` for n bits and 255 more.
template <int kWarps, bool kIsStep>
__device__ __forceinline__ void write_top(const float* scores, int n, int count, uint32_t least,
                                          uint32_t largest, int first_id, int thread,
                                          TopScratch& scratch, int32_t* members, uint32_t* chosen,
                                          int32_t* out) {
  constexpr int kThreads = kWarps * kWarpSize;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  least = __reduce_min_sync(kAllLanes, least);
  largest = __reduce_max_sync(kAllLanes, largest);
  if (lane == 0) {
    scratch.warp_least[warp] = least;
    scratch.warp_largest[warp] = largest;
  }
  sync_select<kWarps, kIsStep>();
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
  sync_select<kWarps, kIsStep>();

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
  sync_select<kWarps, kIsStep>();
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
    sync_select<kWarps, kIsStep>();
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

// write_top of at most kMostCandidates, each of which stays in registers of one thread. `scores`
// has room for 2 n numbers.
constexpr int kThreadCandidates = 8;
template <int kWarps>
constexpr int kMostCandidates = kThreadCandidates * kWarps * kWarpSize;

template <int kWarps, bool kIsStep>
__device__ __forceinline__ void write_top_of_many(const float (&score)[kThreadCandidates], int n,
                                                  int count, int first_id, int thread,
                                                  TopScratch& scratch, float* spare, int32_t* out) {
  constexpr int kThreads = kWarps * kWarpSize;
  constexpr int kWords = kThreadCandidates * kWarps;
  static_assert(kWords == 2 * kWarpSize, "two words a lane");
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  float low = INFINITY;
  float high = -INFINITY;
#pragma unroll
  for (int k = 0; k < kThreadCandidates; ++k) {
    if (k * kThreads >= n) break;
    if (thread + k * kThreads >= n) continue;
    low = fminf(low, score[k]);
    high = fmaxf(high, score[k]);
  }
  const uint32_t least = __reduce_min_sync(kAllLanes, ordered(low));
  const uint32_t largest = __reduce_max_sync(kAllLanes, ordered(high));
  if (lane == 0) {
    scratch.warp_least[warp] = least;
    scratch.warp_largest[warp] = largest;
  }
  sync_select<kWarps, kIsStep>();
  uint32_t bottom = 0xffffffffu;
  uint32_t top = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    bottom = min(bottom, scratch.warp_least[w]);
    top = max(top, scratch.warp_largest[w]);
  }
  if (bottom == top) {
    for (int i = thread; i < count; i += kThreads) out[i] = first_id + i;
    return;
  }

  // Bins of equal width tell all scores apart but the few that share one with the smallest chosen.
  const float base = from_ordered(bottom);
  const float scale = kBins / (from_ordered(top) - base);
  int bin[kThreadCandidates];
#pragma unroll
  for (int k = 0; k < kThreadCandidates; ++k) {
    bin[k] = kBins;
    if (k * kThreads >= n) continue;
    const bool is_here = thread + k * kThreads < n;
    bin[k] = kBins - 1 - min(kBins - 1, static_cast<int>((score[k] - base) * scale));
    if (!is_here) bin[k] = kBins;
    if (is_here) atomicAdd(&scratch.bins[bin[k]], 1);
  }
  sync_select<kWarps, kIsStep>();

  // Every warp finds the bin of the smallest chosen score for itself, and how many of it are
  // chosen.
  constexpr int kLaneBins = kBins / kWarpSize;
  static_assert(kLaneBins == 8, "two chunks a lane");
  const int4* chunks = reinterpret_cast<const int4*>(scratch.bins) + 2 * lane;
  const int4 a = chunks[0], b = chunks[1];
  const int sizes[kLaneBins] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  int before = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
  const int sum = before;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += other;
  }
  before -= sum;
  const int holder = __ffs(__ballot_sync(kAllLanes, count <= before + sum)) - 1;
  int edge = 0;  // bin and how many of it are chosen, in one number
#pragma unroll
  for (int i = 0; i < kLaneBins; ++i) {
    if (before < count) edge = (lane * kLaneBins + i) << 16 | (count - before);
    before += sizes[i];
  }
  edge = __shfl_sync(kAllLanes, edge, holder);
  const int edge_bin = edge >> 16;
  const int open = edge & 0xffff;

  int32_t* members = reinterpret_cast<int32_t*>(spare);
  float* member_scores = spare + n;
#pragma unroll
  for (int k = 0; k < kThreadCandidates; ++k) {
    if (k * kThreads >= n) {
      if (lane == 0) reinterpret_cast<uint32_t*>(scratch.words)[k * kWarps + warp] = 0;
      continue;
    }
    const uint32_t above = __ballot_sync(kAllLanes, bin[k] < edge_bin);
    if (lane == 0) reinterpret_cast<uint32_t*>(scratch.words)[k * kWarps + warp] = above;
    if (bin[k] == edge_bin) {
      const int at = atomicAdd(&scratch.num_members, 1);
      members[at] = thread + k * kThreads;
      member_scores[at] = score[k];
    }
  }
  sync_select<kWarps, kIsStep>();
  const int num_members = scratch.num_members;
  int member = -1;
  uint32_t picked = 0;
  uint2 words = scratch.words[lane];
  if (num_members <= kWarpSize) {
    // Every warp ranks them for itself.
    float mine = 0.0f;
    if (lane < num_members) {
      member = members[lane];
      mine = member_scores[lane];
    }
    int rank = 0;
    if (open < num_members) {
#pragma unroll 1
      for (int j = 0; j < num_members; ++j) {
        const int other = members[j];
        const float other_score = member_scores[j];
        rank += other_score > mine || (other_score == mine && other < member);
      }
    }
    picked = __ballot_sync(kAllLanes, member >= 0 && rank < open);
#pragma unroll 1
    for (uint32_t rest = picked; rest != 0; rest &= rest - 1) {
      const int id = __shfl_sync(kAllLanes, member, __ffs(rest) - 1);
      if (id / kWarpSize == 2 * lane) words.x |= 1u << id % kWarpSize;
      if (id / kWarpSize == 2 * lane + 1) words.y |= 1u << id % kWarpSize;
    }
  } else {
#pragma unroll 1
    for (int k = thread; k < num_members; k += kThreads) {
      const int id = members[k];
      const float mine = member_scores[k];
      int rank = 0;
#pragma unroll 1
      for (int j = 0; j < num_members; ++j) {
        const int other = members[j];
        rank += member_scores[j] > mine || (member_scores[j] == mine && other < id);
      }
      if (rank < open)
        atomicOr(reinterpret_cast<uint32_t*>(scratch.words) + id / kWarpSize, 1u << id % kWarpSize);
    }
    sync_select<kWarps, kIsStep>();
    words = scratch.words[lane];
  }

  // Where each word's ids go.
  const int sizes_both = __popc(words.x) + __popc(words.y);
  int begin = sizes_both;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, begin, offset);
    if (lane >= offset) begin += other;
  }
  begin -= sizes_both;
  const bool is_odd = warp % 2 != 0;
  const uint32_t word = is_odd ? words.y : words.x;
  const int at_word = is_odd ? begin + __popc(words.x) : begin;
#pragma unroll
  for (int k = 0; k < kThreadCandidates; ++k) {
    if (k * kThreads >= n) break;
    const int source = (k * kWarps + warp) / 2;
    const uint32_t bits = __shfl_sync(kAllLanes, word, source);
    const int at = __shfl_sync(kAllLanes, at_word, source);
    if (bits >> lane & 1) {
      out[at + __popc(bits & ((1u << lane) - 1))] = first_id + thread + k * kThreads;
    }
  }
}

// What select_row works in.
struct SelectMemory {
  unsigned char* ring;  // kStages leaves of each warp
  float2* leaves;       // [max_leaves, kPartStride]: maximum and sum of each leaf of K2
  float* own_slots;     // largest score of a block's own slots
  float* first_slot;    // score of its first
  int max_blocks;
  float* lse_log2;  // [kGroupSize]
  TopScratch* top_scratch;
  uint64_t* has_coarse;  // barriers, ready for the cluster
  uint64_t* has_scores;
  uint64_t* has_windows;  // of a step, in the last block: the windows it completes are there
  uint32_t new_coarse;    // of a step: the coarse window that it completes, if it does
  uint32_t q_address;     // of a step: where this lane's rows of the queries begin
};

__device__ __forceinline__ SelectMemory select_memory(const SelectLayout& layout,
                                                      unsigned char* ring, unsigned char* scores,
                                                      float* lse_log2, TopScratch* top_scratch,
                                                      uint64_t* has_coarse, uint64_t* has_scores,
                                                      uint64_t* has_windows, uint32_t new_coarse,
                                                      uint32_t q_address) {
  float2* leaves = reinterpret_cast<float2*>(scores);
  float* own_slots = reinterpret_cast<float*>(leaves + layout.max_leaves * kPartStride);
  return {ring,
          leaves,
          own_slots,
          own_slots + layout.slots(),
          layout.max_blocks,
          lse_log2,
          top_scratch,
          has_coarse,
          has_scores,
          has_windows,
          new_coarse,
          q_address};
}

// Makes the list of a sparse row with more blocks than its budget: the work of kWarps warps of each
// block of the row's cluster. The first block writes it, or of a whole step (kIsStep) each its own
// copy. `bring_more` is called by a step once K2 has come, which nothing shall delay.
template <typename T, int kWarps, int kStages, bool kIsStep>
__device__ __forceinline__ void select_row(const SelectBlocksParams& params, const QueryRow& row,
                                           int token, int kv_head, int rank, int clusters,
                                           const SelectMemory& memory, int thread, int32_t* list) {
  constexpr int kThreads = kWarps * kWarpSize;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int cluster_log2 = __ffs(clusters) - 1;  // clusters are powers of two
  const int budget = params.budget;
  const int own = row.position / kBlockSize;
  float2* leaves = memory.leaves;
  float* own_slots = memory.own_slots;
  float* first_slot = memory.first_slot;

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

  // Every block of a cluster is sent all of K2; the first one, or of a step each, all scores.
  if (clusters > 1 && thread == 0) {
    arrive_expecting(memory.has_coarse,
                     num_coarse_leaves * kGroupSize * static_cast<int>(sizeof(float2)));
    arrive_expecting(memory.has_scores, num_fine_leaves * 2 * static_cast<int>(sizeof(float4)));
  }
  if (clusters > 1 && !kIsStep) cluster_arrive();

  // Of a single token, the windows that it completes count here in one case: the last coarse one.
  // Its last fine one overlaps only local blocks.
  if (!kIsStep && (row.query_len > 1 || params.local_blocks < 2)) wait_for_previous_launch();
  const bool last_is_new = (row.position + 1) % kCoarseKernelStride == 0;

  // The warp's leaves, coarse ones first.
  const int my_coarse = max(0, (coarse_end - coarse_begin - warp + kWarps - 1) / kWarps);
  const int my_fine = max(0, (fine_end - fine_begin - warp + kWarps - 1) / kWarps);
  const int my_leaves = my_coarse + my_fine;
  const int kv_heads = params.heads.num_kv_heads;
  const uint32_t my_ring = shared_address(memory.ring) + warp * kStages * kLeafBytes;
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
  const int k1_page = kv_heads * kFineSlots * kRowBytes;
  const int k2_page = kv_heads * kCoarseSlots * kRowBytes;
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
        if (!kIsStep && last_is_new && base <= num_coarse && num_coarse < base + kLeafRows) {
          wait_for_previous_launch();
        }
#pragma unroll
        for (int i = 0; i < kLeafRows; i += 2) {
          const int page = __shfl_sync(kAllLanes, pages[0], nth * kLeafRows + copy_row + i);
          copy_chunk(stage + swizzled(copy_row + i, chunk), k2 + int64_t{page} * k2_page, true);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kLeafBlocks; ++i) {
          const int page = __shfl_sync(kAllLanes, pages[0], nth * kLeafBlocks + i);
          const int first = i * kFineSlots + copy_row;
          const char* source = k1 + int64_t{page} * k1_page;
          copy_chunk(stage + swizzled(first, chunk), source, true);
          copy_chunk(stage + swizzled(first + 2, chunk), source + 2 * kRowBytes, true);
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
  // Of the rows that this lane points at, the first chunk; chunk 2 * step has its bits flipped.
  const uint32_t matrix_offset = swizzled(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  float lse[2][2];

  // One loop for all leaves and all that is done with them: these kernels run each line of code a
  // few times only, so that fetching instructions costs as much as executing them.
  int loaded = 0;
#pragma unroll 1
  for (int item = -1; item <= my_leaves; ++item) {
    __syncwarp();  // every lane has read the stage that is loaded next
#pragma unroll 1
    for (; loaded < item + kStages; ++loaded) load_leaf(loaded);
    if (item < 0) {
      if constexpr (!kIsStep) load_q<T>(q, q_heads, lane);
#pragma unroll 1
      for (int i = thread; i < static_cast<int>(sizeof(TopScratch) / sizeof(int)); i += kThreads) {
        reinterpret_cast<int*>(memory.top_scratch)[i] = 0;
      }
      // Every block of the cluster runs: it may be written to.
      if (clusters > 1 && !kIsStep) cluster_wait();
      if constexpr (kIsStep) {
#pragma unroll
        for (int step = 0; step < kKSteps; ++step) {
          ldmatrix_x4(q[step], memory.q_address + step * 2 * kChunkBytes);
        }
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
      if constexpr (kIsStep) {
        // What was copied is older than the window that this step completed.
        const int new_row = num_coarse - first_row_of(item);
        if (last_is_new && is_coarse && new_row >= 0 && new_row < kLeafRows) {
          wait_phase(memory.has_windows, 0);
          if (lane < kRowChunks) {
            move_chunk(stage + swizzled(new_row, lane), memory.new_coarse + lane * kChunkBytes);
          }
          __syncwarp();
        }
      }
      float odd[2][4] = {};
#pragma unroll
      for (int step = 0; step < kKSteps; ++step) {
        uint32_t keys[4];
        ldmatrix_x4(keys, stage + (matrix_offset ^ (2 * step * kChunkBytes)));
        const uint32_t rows[4] = {keys[0], keys[2], keys[1], keys[3]};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          mma_16x8x16<T>(step % 2 ? odd[n] : scores[n], rows, q[step][n], q[step][n + 2]);
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[n][i] = __fmul_rn(scores[n][i] + odd[n][i], scale_log2);
        }
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
          const uint32_t barrier = address_in_block(memory.has_coarse, target);
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
        wait_phase(memory.has_coarse, 0);
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
          sum[i] = __fmaf_rn(part.y, exp2_approx(part.x - peak[i]), sum[i]);
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
        if (lane == i) memory.lse_log2[warp * kHeadsPerWarp + i] = num_coarse > 0 ? mine : 0.0f;
      }
      sync_select<kWarps, kIsStep>();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        lse[i / 2][i % 2] = memory.lse_log2[i / 2 * 8 + lane % 4 * 2 + i % 2];
      }
    }
    if (item == my_leaves) break;

    const int leaf = fine_begin + warp + (item - my_coarse) * kWarps;
    float window[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        scores[n][i] = __fsub_rn(scores[n][i], lse[n][i % 2]);
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
    // Each half of a warp has the best of two blocks, 0 and 2 of the leaf or 1 and 3, and their
    // first slots. The lower half sends what counts for a block itself, the upper one what counts
    // for the one before: of a step a lane to each block, else to the first.
    const bool is_lower = lane < 16;
    float other[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      window[r] = __shfl_sync(kAllLanes, window[r], lane & 16);
      other[r] = __shfl_xor_sync(kAllLanes, is_lower ? window[r] : best[r], 16);
    }
    const float4 values = is_lower ? make_float4(best[0], other[0], best[1], other[1])
                                   : make_float4(other[0], window[0], other[1], window[1]);
    float* target = (is_lower ? own_slots : first_slot) + leaf * kLeafBlocks;
    const int receiver = lane % 16;
    if (clusters > 1) {
      if (receiver < (kIsStep ? clusters : 1)) {
        send(address_in_block(target, receiver), address_in_block(memory.has_scores, receiver),
             values);
      }
    } else if (receiver == 0) {
      *reinterpret_cast<float4*>(target) = values;
    }
  }

  // Of a step the copy engine writes over the leaves next. Said here, where there is time.
  if constexpr (kIsStep) publish_writes();
  const bool makes_list = kIsStep || rank == 0;
  if (clusters > 1 && makes_list) {
    wait_phase(memory.has_scores, 0);
    sync_select<kWarps, kIsStep>();  // all warps have read the leaves for the last time
  } else if (clusters == 1) {
    __syncthreads();
  }
  if (makes_list) {
    const int num_candidates = first_local - first_candidate;
    float* scores = reinterpret_cast<float*>(leaves);
    // Of NaN nothing is chosen first, and the bins hold no infinity.
    const auto score_of = [&](int i) {
      const int block = first_candidate + i;
      return fmaxf(fmaxf(own_slots[block], first_slot[block + 1]), -3.4e38f) + 0.0f;
    };
    const int wanted = budget - first_candidate - params.local_blocks;
#pragma unroll 1
    for (int i = thread; i < first_candidate; i += kThreads) list[i] = i;
#pragma unroll 1
    for (int i = thread; i < params.local_blocks; i += kThreads) {
      list[budget - params.local_blocks + i] = first_local + i;
    }
    if (wanted <= 0) return;
    if constexpr (kIsStep) {
      float mine[kThreadCandidates];
#pragma unroll
      for (int k = 0; k < kThreadCandidates; ++k) {
        const int i = thread + k * kThreads;
        mine[k] = i < num_candidates ? score_of(i) : 0.0f;
      }
      write_top_of_many<kWarps, kIsStep>(mine, num_candidates, wanted, first_candidate, thread,
                                         *memory.top_scratch, scores, list + first_candidate);
    } else {
      uint32_t least = 0xffffffffu;
      uint32_t largest = 0;
#pragma unroll 4
      for (int i = thread; i < num_candidates; i += kThreads) {
        scores[i] = score_of(i);
        const uint32_t key = ordered(scores[i]);
        least = min(least, key);
        largest = max(largest, key);
      }
      write_top<kWarps, kIsStep>(scores, num_candidates, wanted, least, largest, first_candidate,
                                 thread, *memory.top_scratch,
                                 reinterpret_cast<int32_t*>(scores + memory.max_blocks),
                                 reinterpret_cast<uint32_t*>(own_slots), list + first_candidate);
    }
  }
}

}  // namespace cuda
}  // namespace minicpm41
