// Attention of the rows of prefill requests on sm_90a.
//
// Neighbouring tokens list mostly the same blocks: a thread block takes 12 of them and walks the
// union of their lists. Of its four warpgroups three compute, 4 tokens each: 64 rows of wgmma, 16
// heads of one token a warp, so that whether a token lists a block is one answer for a whole warp.
// A warpgroup passes over blocks that none of its tokens lists; a warp whose token does not list a
// block skips its softmax and multiplies the values by 0.
//
// In the fourth warpgroup one warp has the copy engine fill a ring of K and V pages, and the other
// three find out which tokens list what in the next tile. What a stage of the ring holds is told by
// an entry beside it; a tile begins with a stage that holds an entry alone. Thread blocks stay for
// all of their tiles, so that a tile's first pages arrive while the tile before is finished.
//
// While one warpgroup weighs its scores, the tensor cores serve the two others. How often that
// succeeds depends on how long weighing takes: it looks for no maximum as long as weights stay in
// range.
#include "hopper.cuh"
#include "prefill_attention.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr int kConsumers = 3;  // warpgroups that compute
constexpr int kWarpgroup = 128;
constexpr int kWarps = kWarpgroup / kWarpSize;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kTokens = kConsumers * kWarps;
constexpr int kStages = 5;
constexpr int kPageBytes = kBlockSize * kRowBytes;
// What a thread of each may use, in multiples of 8.
constexpr int kConsumerRegisters = 152;
constexpr int kProducerRegisters = 56;
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters == 65536 / kWarpgroup,
              "all registers of a multiprocessor");
static_assert(kTokens <= kMarkBits, "a mark holds a bit a token");

// Tiles lie in the 128-byte swizzle: [half of the row][row][64 numbers].
struct __align__(1024) Tiles {
  unsigned char k[kStages][kPageBytes];
  unsigned char v[kStages][kPageBytes];
  unsigned char q[kConsumers][kPageBytes];
  uint32_t marks[2][kMarkedBlocks * kMarkBits / 32];
};

#ifdef MINICPM41_HAS_WGMMA

constexpr int kMarkers = 96;  // threads that make marks: three warps
constexpr int kHalfBytes = kPageBytes / 2;
// Named barriers; 0 is __syncthreads.
constexpr int kMarkersBarrier = 1;
constexpr int kConsumerBarrier = 2;  // and one for each further warpgroup

// Up to kMarkedBlocks blocks of one tile of one kv head.
struct MarkedTile {
  Tile tile;  // rows 0: there are no more
  int kv_head;
  int base;  // first block
  int count;
};

// What a stage holds: a block and its mark, or, with mark 0, what the next tile is.
struct __align__(16) Entry {
  int mark;
  int block;  // header: kv_head * kMarkBits + rows; rows 0 ends the work
  int row;    // header only, as is the next
  int position;
};

struct Signals {
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint64_t marks_full[2], marks_empty[2];
  Entry entries[kStages];
  MarkedTile marked[2];
};

// A place in a ring, and the parity of the phase in which it is filled.
template <int kPlaces>
struct Cursor {
  int at = 0;
  int parity = 0;
  __device__ __forceinline__ void advance() {
    if (++at == kPlaces) {
      at = 0;
      parity ^= 1;
    }
  }
};

// Three warps: marks the tiles of this thread block, one ahead of the copies.
__device__ __forceinline__ void make_marks(Tiles& tiles, Signals& signals,
                                           const SparseAttentionParams& params, int thread) {
  const int lane = thread % kWarpSize;
  const int kv_heads = params.heads.num_kv_heads;
  const Cut cut = cut_call(params.batch, kTokens, kWarps, kv_heads, gridDim.x, lane);
  const int large_turns = cut.large_tiles * kv_heads;
  const int turns = large_turns + cut.small_tiles * kv_heads;
  Cursor<2> buffer;
  wait_for_previous_launch();  // for the lists
  // One kv head after the other, so that L2 serves one at a time; the latest positions, whose lists
  // are the longest, first.
  for (int turn = blockIdx.x;; turn += gridDim.x) {
    const bool is_end = turn >= turns;
    Tile tile = {};
    int kv_head = 0;
    if (!is_end) {
      const bool is_small = turn >= large_turns;
      const int tiles = is_small ? cut.small_tiles : cut.large_tiles;
      const int index = is_small ? turn - large_turns : turn;
      kv_head = index / tiles;
      tile = find_tile(params.batch, cut, is_small, tiles - 1 - index % tiles, lane);
    }
    const int blocks = is_end ? 1 : blocks_of(params.batch, tile);
    for (int base = 0; base < blocks; base += kMarkedBlocks) {
      const int count = min(blocks - base, kMarkedBlocks);
      uint32_t* marks = tiles.marks[buffer.at];
      wait_phase(&signals.marks_empty[buffer.at], buffer.parity ^ 1);
      if (!is_end) {
        mark_dense(marks, params, tile, base, count, thread, kMarkers);
        sync_named(kMarkersBarrier, kMarkers);
        mark_listed(marks, params, tile, kv_head, base, count, thread, kMarkers);
      }
      if (thread == 0) signals.marked[buffer.at] = {tile, kv_head, base, count};
      arrive(&signals.marks_full[buffer.at]);
      buffer.advance();
    }
    if (is_end) return;
  }
}

// One warp: has the pages of marked blocks copied into the ring.
template <typename T>
__device__ __forceinline__ void copy_pages(Tiles& tiles, Signals& signals,
                                           const SparseAttentionParams& params,
                                           const CUtensorMap* k_map, const CUtensorMap* v_map,
                                           int lane) {
  Cursor<kStages> ring;
  Cursor<2> buffer;
  for (;;) {
    wait_phase(&signals.marks_full[buffer.at], buffer.parity);
    const MarkedTile& marked = signals.marked[buffer.at];
    const int rows = marked.tile.rows;
    const int kv_head = marked.kv_head;
    const int base = marked.base;
    const int last = marked.tile.position + rows - 1;
    if (base == 0) {
      if (lane == 0) {
        wait_phase(&signals.k_empty[ring.at], ring.parity ^ 1);
        wait_phase(&signals.v_empty[ring.at], ring.parity ^ 1);
        signals.entries[ring.at] = {0, kv_head * kMarkBits + rows, marked.tile.row,
                                    marked.tile.position};
        arrive(&signals.k_full[ring.at]);
        arrive(&signals.v_full[ring.at]);
      }
      ring.advance();
    }
    if (rows == 0) return;
    MarkedBlocks walk(
        tiles.marks[buffer.at],
        params.batch.block_tables + int64_t{marked.tile.request} * params.batch.max_blocks + base,
        marked.count, params.batch.num_pages, lane);
    int block, mark, page;
    while (walk.next(&block, &mark, &page)) {
      block += base;
      const int first_row = (page * params.heads.num_kv_heads + kv_head) * kBlockSize;
      const bool is_cut = last < block * kBlockSize + kBlockSize - 1;
      if (lane == 0) {
        uint64_t* full = &signals.k_full[ring.at];
        wait_phase(&signals.k_empty[ring.at], ring.parity ^ 1);
        signals.entries[ring.at] = {mark, block, 0, 0};
        arrive_expecting(full, kPageBytes);
        copy_page(k_map, tiles.k[ring.at], full, first_row);
        if (!is_cut) {
          full = &signals.v_full[ring.at];
          wait_phase(&signals.v_empty[ring.at], ring.parity ^ 1);
          arrive_expecting(full, kPageBytes);
          copy_page(v_map, tiles.v[ring.at], full, first_row);
        }
      }
      if (is_cut) {
        // Values after the tile's last row may never have been written, and 0 * NaN is NaN: these
        // become 0, which the copy engine cannot do.
        wait_phase(&signals.v_empty[ring.at], ring.parity ^ 1);
        const T* values = static_cast<const T*>(params.v_cache) + int64_t{first_row} * kHeadDim;
        const int chunk = lane % kRowChunks;
        const uint32_t target =
            shared_address(tiles.v[ring.at]) + chunk / (kRowChunks / 2) * kHalfBytes;
#pragma unroll 4
        for (int key = lane / kRowChunks; key < kBlockSize; key += kWarpSize / kRowChunks) {
          copy_chunk(target + key * (kRowBytes / 2) + (chunk ^ key) % 8 * kChunkBytes,
                     values + key * kHeadDim + chunk * 8, block * kBlockSize + key <= last);
        }
        commit_copies();
        wait_copies<0>();
        publish_writes();
        __syncwarp();
        if (lane == 0) arrive(&signals.v_full[ring.at]);
      }
      ring.advance();
    }
    __syncwarp();
    if (lane == 0) arrive(&signals.marks_empty[buffer.at]);
    buffer.advance();
  }
}

// One of the warpgroups that compute.
template <typename T>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(Tiles& tiles, Signals& signals,
                                      const SparseAttentionParams& params, int warpgroup,
                                      int thread)
      : tiles_(tiles),
        signals_(signals),
        params_(params),
        warpgroup_(warpgroup),
        warp_(thread / kWarpSize),
        lane_(thread % kWarpSize),
        token_(warpgroup * kWarps + warp_),
        scale_log2_(params.softmax_scale * kLog2e) {}

  __device__ __forceinline__ void run() {
    for (;;) {
      wait_phase(&signals_.k_full[ring_.at], ring_.parity);
      const Entry header = signals_.entries[ring_.at];
      pass();
      const int rows = header.block % kMarkBits;
      const int kv_head = header.block / kMarkBits;
      if (rows == 0) return;
      position_ = header.position + token_;
      // A warp past the tile's last row reads that row's queries; nothing is marked for it.
      load_queries(static_cast<const T*>(params_.q) +
                   (header.row + min(token_, rows - 1)) * params_.q_stride +
                   kv_head * kGroupSize * kHeadDim);
      state_.clear();
      attend_all();
      if (token_ < rows) {
        write_row<T>(params_, header.row + token_, kv_head, state_, lane_);
      }
    }
  }

 private:
  struct Next {
    int mark;
    int block;
  };
  __device__ __forceinline__ void release(uint64_t* barrier) {
    if (lane_ == 0) arrive(barrier);
  }
  __device__ __forceinline__ void pass() {
    wait_phase(&signals_.v_full[ring_.at], ring_.parity);
    __syncwarp();
    release(&signals_.k_empty[ring_.at]);
    release(&signals_.v_empty[ring_.at]);
    ring_.advance();
  }
  __device__ __forceinline__ Next peek() {
    wait_phase(&signals_.k_full[ring_.at], ring_.parity);
    const int2 entry = *reinterpret_cast<const int2*>(&signals_.entries[ring_.at]);
    return {entry.x, entry.y};
  }
  // Whether a token of the warpgroup lists it.
  __device__ __forceinline__ bool is_wanted(const Next& next) const {
    return (next.mark >> (warpgroup_ * kWarps) & ((1 << kWarps) - 1)) != 0;
  }
  // Passes over blocks that are not wanted, up to one that is or a header.
  __device__ __forceinline__ Next look_on(Next next) {
    while (next.mark != 0 && !is_wanted(next)) {
      pass();
      next = peek();
    }
    return next;
  }

  __device__ __forceinline__ void load_queries(const T* queries) {
    sync_named(kConsumerBarrier + warpgroup_, kWarpgroup);  // the last ones are multiplied
#pragma unroll
    for (int i = lane_; i < kGroupSize * kRowChunks; i += kWarpSize) {
      const int head = i / kRowChunks;
      const int chunk = i % kRowChunks;
      *reinterpret_cast<uint4*>(tiles_.q[warpgroup_] + chunk / (kRowChunks / 2) * kHalfBytes +
                                (warp_ * kGroupSize + head) * (kRowBytes / 2) +
                                (chunk ^ head) % 8 * kChunkBytes) =
          *reinterpret_cast<const uint4*>(queries + i * 8);
    }
    publish_writes();
    sync_named(kConsumerBarrier + warpgroup_, kWarpgroup);
  }

  // Both start products and return. That a stage is the same in all lanes shows in the shuffle,
  // which leaves descriptors to uniform registers.
  __device__ __forceinline__ void multiply_keys() {
    const int stage = __shfl_sync(kAllLanes, ring_.at, 0);
    const uint32_t queries = operand(shared_address(tiles_.q[warpgroup_]), 0);
    const uint32_t keys = operand(shared_address(tiles_.k[stage]), 0);
    begin_products();
#pragma unroll
    for (int step = 0; step < kKSteps; ++step) {
      const uint32_t at = (step / 4 * kHalfBytes + step % 4 * 32) >> 4;
      product_64x64x16<T>(scores_, queries + at, keys + at, step > 0);
    }
    end_products();
  }
  __device__ __forceinline__ void multiply_values() {
    const int stage = __shfl_sync(kAllLanes, ring_.at, 0);
    const uint32_t values = operand(shared_address(tiles_.v[stage]), kHalfBytes);
    wait_phase(&signals_.v_full[ring_.at], ring_.parity);
    begin_products();
#pragma unroll
    for (int step = 0; step < kBlockSize / 16; ++step) {
      product_64x128x16<T>(state_.out, weights_[step], values + (step * 16 * (kRowBytes / 2) >> 4));
    }
    end_products();
  }

  // All blocks of a tile, up to the header of the next.
  __device__ __forceinline__ void attend_all() {
    Next next = look_on(peek());
    if (next.mark == 0) return;
    pin(scores_);
    multiply_keys();
    wait_products<0>();
    for (;;) {
      pin(scores_);
      pin(state_.out);
      release(&signals_.k_empty[ring_.at]);
      if (next.mark >> token_ & 1) {
        const int last_key =
            next.block == position_ / kBlockSize ? position_ % kBlockSize : kBlockSize - 1;
        weigh<T>(weights_, scores_, state_, scale_log2_, last_key, lane_);
      } else {
#pragma unroll
        for (int i = 0; i < kScores / 2; ++i) weights_[i / 4][i % 4] = 0;
      }
      pin(state_.out);
      multiply_values();
      const int read = ring_.at;
      ring_.advance();
      next = peek();
      if (is_wanted(next)) {  // its scores come right behind
        pin(scores_);
        multiply_keys();
        wait_products<0>();
        release(&signals_.v_empty[read]);
      } else {  // the ring cannot turn over values that are in use
        wait_products<0>();
        pin(state_.out);
        release(&signals_.v_empty[read]);
        next = look_on(next);
        if (next.mark == 0) return;
        pin(scores_);
        multiply_keys();
        wait_products<0>();
      }
    }
  }

  Tiles& tiles_;
  Signals& signals_;
  const SparseAttentionParams& params_;
  const int warpgroup_, warp_, lane_, token_;
  const float scale_log2_;
  Cursor<kStages> ring_;
  int position_ = 0;
  float scores_[kScores];
  uint32_t weights_[kBlockSize / 16][4];
  Softmax state_;
};

#endif  // MINICPM41_HAS_WGMMA

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_prefill_sm90_kernel(const __grid_constant__ SparseAttentionParams params,
                               const __grid_constant__ CUtensorMap k_map,
                               const __grid_constant__ CUtensorMap v_map) {
#ifdef MINICPM41_HAS_WGMMA
  extern __shared__ __align__(1024) unsigned char dynamic[];
  __shared__ Signals signals;
  Tiles& tiles = *reinterpret_cast<Tiles*>(dynamic);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&signals.k_full[i], 1);
      init_barrier(&signals.v_full[i], 1);
      init_barrier(&signals.k_empty[i], kConsumers * kWarps);
      init_barrier(&signals.v_empty[i], kConsumers * kWarps);
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(&signals.marks_full[i], kMarkers);
      init_barrier(&signals.marks_empty[i], 1);
    }
    publish_barriers();
    prefetch_map(&k_map);
    prefetch_map(&v_map);
  }
  __syncthreads();
  // The same in all lanes, and the compiler is to know it.
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
  const int thread = threadIdx.x % kWarpgroup;
  if (warpgroup == kConsumers) {
    shrink_registers<kProducerRegisters>();
    if (thread < kMarkers) {
      make_marks(tiles, signals, params, thread);
    } else {
      copy_pages<T>(tiles, signals, params, &k_map, &v_map, thread % kWarpSize);
    }
  } else {
    grow_registers<kConsumerRegisters>();
    Consumer<T>(tiles, signals, params, warpgroup, thread).run();
  }
#endif
}

using Kernel = void (*)(SparseAttentionParams, CUtensorMap, CUtensorMap);

}  // namespace

// Compiled for any other architecture the kernel is empty and has no shared memory of its own.
bool has_sparse_prefill_sm90() {
  static const bool is_built = holds_kernel(sparse_prefill_sm90_kernel<__nv_bfloat16>);
  return is_built;
}

Status sparse_prefill_sm90(const SparseAttentionParams& params, void* stream) {
  const char* op = "sparse_attention";
  const Batch& batch = params.batch;
  const Heads& heads = params.heads;
  const Kernel kernel = heads.dtype == kFloat16 ? sparse_prefill_sm90_kernel<__half>
                                                : sparse_prefill_sm90_kernel<__nv_bfloat16>;
  CUtensorMap k_map, v_map;
  Status status =
      encode_page_map(op, params.k_cache, batch.num_pages, heads.num_kv_heads, heads.dtype, &k_map);
  if (status.ok()) {
    status = encode_page_map(op, params.v_cache, batch.num_pages, heads.num_kv_heads, heads.dtype,
                             &v_map);
  }
  if (!status.ok()) return status;
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Tiles);
  int fits = 0;
  const cudaError_t error = count_clusters(kernel, kThreads, shape.shared_bytes, 1, &fits);
  if (error != cudaSuccess) return launch_status(op, error);
  shape.grid = dim3(static_cast<unsigned>(
      std::min<int64_t>(fits, most_tiles(batch, kWarps) * heads.num_kv_heads)));
  shape.overlap = true;  // with sparse_decode_sm90
  return launch_status(op, launch(kernel, shape, stream, params, k_map, v_map));
}

}  // namespace cuda
}  // namespace minicpm41
