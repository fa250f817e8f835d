// What passes between a caller and a kernel: one plain struct an op, filled by name, read by the
// CPU and the CUDA side alike and mirrored by ctypes through capi.cc. Pointers carry their shape;
// strides are in elements, not bytes. Nothing here or below knows a tensor framework.
#pragma once

#include <cstdint>

namespace minicpm41 {

// A page of the KV cache holds exactly one block of the selection, so a logical block id is an
// index into a request's block table.
constexpr int kBlockSize = 64;
// Fine windows (K1) cover 32 keys every 16; coarse windows (K2) cover 128 keys every 64.
constexpr int kKernelSize = 32;
constexpr int kKernelStride = 16;
constexpr int kCoarseKernelSize = 4 * kKernelSize;
constexpr int kCoarseKernelStride = 4 * kKernelStride;
// A window is stored in the page that holds its last token: 4 fine slots and 1 coarse slot a page.
constexpr int kFineSlots = kBlockSize / kKernelStride;
constexpr int kCoarseSlots = kBlockSize / kCoarseKernelStride;

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// The requests of one step. kv_len(b) = history_lens[b] + query_lens[b]. Token t of request b
// stands at position history_lens[b] + t - cu_seqlens_q[b]. A slot with query_lens[b] == 0 is idle.
struct Batch {
  const int32_t* batch_id_per_token;  // [num_tokens], -1: a padding row, nothing is read or written
  const int32_t* cu_seqlens_q;        // [batch_size + 1]
  const int32_t* query_lens;          // [batch_size] new tokens this step
  const int32_t* history_lens;        // [batch_size] tokens in the cache before this step
  const int32_t* block_tables;        // [batch_size, max_blocks] logical block -> page, -1 padded
  int32_t num_tokens;
  int32_t batch_size;
  int32_t max_blocks;     // also the row stride of block_tables; bounds every grid
  int32_t num_pages;      // pages in each cache tensor
  int32_t max_query_len;  // no query_lens[b] is larger; num_tokens where the caller knows no better
};

// The attention geometry of this rank.
struct Heads {
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t dtype;  // DType of q, k, v, the caches and out
};

// Rotates q in place (NeoX halves, fp32 arithmetic) and writes rotated k and plain v to their
// pages.
struct RopeAndWriteKvParams {
  Batch batch;
  Heads heads;
  void* q;           // [num_tokens, num_q_heads, head_dim], rotated in place
  const void* k;     // [num_tokens, num_kv_heads, head_dim], not rotated
  const void* v;     // [num_tokens, num_kv_heads, head_dim]
  const float* cos;  // [max_position, head_dim], both halves alike
  const float* sin;  // [max_position, head_dim]
  void* k_cache;     // [num_pages, num_kv_heads, kBlockSize, head_dim]
  void* v_cache;     // [num_pages, num_kv_heads, kBlockSize, head_dim]
  int64_t q_stride;  // between tokens
  int64_t k_stride;
  int64_t v_stride;
  int32_t max_position;
};

// Writes the mean of every fine and coarse window that ends inside [compress_from[b], kv_len(b)).
struct CompressKeysParams {
  Batch batch;
  Heads heads;
  const int32_t* compress_from;  // [batch_size]; nullptr: history_lens. 0 rebuilds the whole prefix
  const void* k_cache;           // [num_pages, num_kv_heads, kBlockSize, head_dim]
  void* k1_cache;                // [num_pages, num_kv_heads, kFineSlots, head_dim]
  void* k2_cache;                // [num_pages, num_kv_heads, kCoarseSlots, head_dim]
};

// Lists, for every token and kv head, the blocks it attends to.
struct SelectBlocksParams {
  Batch batch;
  Heads heads;
  const void* q;         // [num_tokens, num_q_heads, head_dim], rotated
  const void* k1_cache;  // [num_pages, num_kv_heads, kFineSlots, head_dim]
  const void* k2_cache;  // [num_pages, num_kv_heads, kCoarseSlots, head_dim]
  int32_t* topk_idx;     // [num_kv_heads, num_tokens, budget] logical ids, ascending, -1 padded
  void* workspace;       // select_blocks_workspace() bytes, may be nullptr when that is 0
  int64_t workspace_bytes;
  int64_t q_stride;  // between tokens
  float softmax_scale;
  int32_t init_blocks;   // forced at the start
  int32_t local_blocks;  // forced up to and with the token's own block: window_size / 64 + 1
  int32_t budget;        // blocks a row attends to at most: topk + window_size / 64
  int32_t dense_len;     // a row at position p is sparse iff p + 1 >= dense_len
  int32_t overlap;       // 1: the launch before this one on the stream is run_compress_keys of this
                         // step, and this one may start before it ends. 0: promises nothing
};

// Attends to the listed blocks, causally inside the last one. A row with p + 1 < dense_len attends
// to all of its blocks and its list is not read.
struct SparseAttentionParams {
  Batch batch;
  Heads heads;
  const void* q;            // [num_tokens, num_q_heads, head_dim], rotated
  const void* k_cache;      // [num_pages, num_kv_heads, kBlockSize, head_dim]
  const void* v_cache;      // [num_pages, num_kv_heads, kBlockSize, head_dim]
  const int32_t* topk_idx;  // [num_kv_heads, num_tokens, budget]
  void* out;                // [num_tokens, num_q_heads, head_dim]; padding rows are set to 0
  float* lse;               // [num_tokens, num_q_heads] natural log; may be nullptr
  void* workspace;          // sparse_attention_workspace() bytes, may be nullptr when that is 0
  int64_t workspace_bytes;
  int64_t q_stride;    // between tokens
  int64_t out_stride;  // between tokens
  float softmax_scale;
  int32_t budget;
  int32_t dense_len;
  int32_t overlap;  // 1: the launch before this one on the stream is run_select_blocks of this
                    // step, and this one may start before it ends. 0: promises nothing
};

}  // namespace minicpm41
