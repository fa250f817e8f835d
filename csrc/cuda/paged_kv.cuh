// Addresses in the paged caches, and where a query token stands. Pages are [num_kv_heads, slots,
// head_dim] each; `slots` is kBlockSize for K and V, kFineSlots for K1, kCoarseSlots for K2.
#pragma once

#include "common.cuh"

namespace minicpm41 {
namespace cuda {

struct QueryRow {
  const int32_t* pages;  // block table of its request
  int position;
  int query_len;
};

// False for a padding row. In a decode step token t mostly belongs to request t: its lengths are
// fetched while the owner is looked up, which saves a trip to memory.
__device__ __forceinline__ bool load_query_row(const Batch& batch, int token, QueryRow* row) {
  const int guess = min(token, batch.batch_size - 1);
  const int request = __ldg(batch.batch_id_per_token + token);
  int query_len = __ldg(batch.query_lens + guess);
  int history_len = __ldg(batch.history_lens + guess);
  int first_token = __ldg(batch.cu_seqlens_q + guess);
  if (request < 0) return false;
  if (request != guess) {
    query_len = __ldg(batch.query_lens + request);
    history_len = __ldg(batch.history_lens + request);
    first_token = __ldg(batch.cu_seqlens_q + request);
  }
  row->pages = batch.block_tables + int64_t{request} * batch.max_blocks;
  row->query_len = query_len;
  row->position = history_len + token - first_token;
  return true;
}

// First element of a slot.
template <int kSlots, typename T>
__device__ __forceinline__ const T* slot_row(const T* cache, int page, int num_kv_heads,
                                             int kv_head, int slot) {
  return cache + ((int64_t{page} * num_kv_heads + kv_head) * kSlots + slot) * kHeadDim;
}

// Brings a block table into L1 before its entries are needed one by one; the work of `threads`.
__device__ __forceinline__ void touch_table(const int32_t* pages, int count, int thread,
                                            int threads) {
  constexpr int kLineEntries = 128 / sizeof(int32_t);
  for (int entry = thread * kLineEntries; entry < count; entry += threads * kLineEntries) {
    [[maybe_unused]] int32_t page;
    asm volatile("ld.global.ca.s32 %0, [%1];" : "=r"(page) : "l"(pages + entry));
  }
}

}  // namespace cuda
}  // namespace minicpm41
