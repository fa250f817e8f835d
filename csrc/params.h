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

// Activations and caches take the first three; the last two are what a low-bit weight may also be
// expanded to.
enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kFloat8E4M3 = 4 };

// The requests of one step. kv_len(b) = history_lens[b] + query_lens[b]. Token t of request b
// stands at position history_lens[b] + t - cu_seqlens_q[b]. A slot with query_lens[b] == 0 is idle.
// A call of select_blocks or sparse_attention may be a window of a longer step: cu_seqlens_q then
// counts from its first row and starts below 0, and of request b it holds the rows from
// max(0, cu_seqlens_q[b]) to min(num_tokens, cu_seqlens_q[b] + query_lens[b]).
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
// May start before the launch before it on the stream ends: that one may write new keys, but none
// that stand before history_lens[b], and nothing of the batch.
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

// A low-bit weight is stored in tiles of 16 rows (out features) by 128 columns (in features), the
// last ones padded with zeros, in the order in which the lanes of an mma.m16n8k16 hold operand A.
constexpr int kTileRows = 16;
constexpr int kTileColumns = 128;

// W [out_features, in_features]. Row r, column k of a tile: lane = 4 * (r % 8) + k / 2 % 4, and in
// this lane block b = k / 32, half h = r / 8, pair p = k / 8 % 4, element e = k % 2. The lane's
// codes lie in chunks of 16 bytes, tile = [chunk][32 lanes][16 bytes], as little-endian words:
//   2 bits: 1 chunk,  word 2 (b / 2) + h,         bits 16 e + 2 (4 (b % 2) + p)
//   4 bits: 2 chunks, chunk b / 2, word 2 (b % 2) + h,  bits 16 e + 4 p
//   8 bits: 4 chunks, chunk b, word 2 h + p / 2,  bits 16 (p % 2) + 8 e
struct LowBitWeight {
  const uint8_t* qweight;  // [row_tiles, k_tiles, 256 * bits]
  const uint16_t* scales;  // bfloat16 [row_tiles, in_features / group, 16], rows 0, 8, 1, 9, ...
  int32_t out_features;
  int32_t in_features;
  int32_t bits;      // 2, 4 or 8
  int32_t group;     // columns that share a scale: 64, 128, or with 8 bits in_features
  int32_t zero;      // a code's value is (code - zero / 2) * scale: 2 or 3, 16, 256
  int32_t hadamard;  // 64 or 128: W H is stored, H in blocks of this size along a row; 0: W is
};

// out = x W^T, sums in fp32.
struct LowBitLinearParams {
  LowBitWeight weight;
  const void* x;    // [num_tokens, in_features]
  void* out;        // [num_tokens, out_features]
  void* workspace;  // low_bit_linear_workspace() bytes, may be nullptr when that is 0
  int64_t workspace_bytes;
  int32_t num_tokens;  // on a GPU at most kMaxDecodeTokens
  int32_t dtype;       // DType of x and out
};
constexpr int kMaxDecodeTokens = 64;

// Rows of the weight itself, a Hadamard transform undone; or, for products of 8-bit numbers, rows
// of W / channel_scales, which the formats made for it hold exactly.
struct ExpandLowBitWeightParams {
  LowBitWeight weight;
  const float* channel_scales;  // [out_features] for kInt8 and kFloat8E4M3, else nullptr
  void* out;                    // [num_rows, in_features]
  int32_t first_row;            // a multiple of kTileRows
  int32_t num_rows;
  int32_t dtype;  // of out
};

}  // namespace minicpm41
