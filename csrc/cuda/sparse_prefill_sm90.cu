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
// more tiles, so that a tile's first pages arrive while the tile before is finished. Tiles differ
// in how much they list: a thread block takes its next one, from a counter, when it is nearly done
// with the last. Who works on a tile does not show in its rows.
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
// The next tile is taken when so many blocks of positions are left of the last one. Making its
// marks takes as long as some five listed blocks, and the ring holds five more.
constexpr int kMarkAhead = 12;
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
  bool is_last;  // of the tile
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
  uint64_t is_ending;  // the copies of a tile are about to end
  Entry entries[kStages];
  MarkedTile marked[2];
  Cut cut;
  int turn;
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

// Three warps: take tiles for this thread block and mark them, one ahead of the copies.
__device__ __forceinline__ void make_marks(Tiles& tiles, Signals& signals,
                                           const SparseAttentionParams& params, int thread) {
  const int lane = thread % kWarpSize;
  const int kv_heads = params.heads.num_kv_heads;
  const Cut found = cut_call(params.batch, kTokens, kWarps, kv_heads, gridDim.x, lane);
  if (thread == 0) signals.cut = found;
  sync_named(kMarkersBarrier, kMarkers);
  const Cut& cut = signals.cut;
  int32_t* turns_taken = static_cast<int32_t*>(params.workspace);
  int parity = 0;
  Cursor<2> buffer;
  // With overlap, the lists of the first tile are waited for one by one.
  if (params.overlap == 0) wait_for_previous_launch();
  // One kv head after the other, so that L2 serves one at a time; the latest positions, whose lists
  // are the longest, first.
  for (int turn = blockIdx.x;;) {
    Tile tile = {};
    int kv_head = 0;
    for (int size = 0; size < Cut::kSizes && tile.rows == 0; ++size) {
      const int tiles = cut.tiles[size];
      if (turn < tiles * kv_heads) {
        kv_head = turn / tiles;
        tile = find_tile(params.batch, cut, size, tiles - 1 - turn % tiles, lane);
      }
      turn -= tiles * kv_heads;
    }
    const bool is_end = tile.rows == 0;
    const int blocks = is_end ? 1 : blocks_of(params.batch, tile);
    for (int base = 0; base < blocks; base += kMarkedBlocks) {
      const int count = min(blocks - base, kMarkedBlocks);
      uint32_t* marks = tiles.marks[buffer.at];
      wait_phase(&signals.marks_empty[buffer.at], buffer.parity ^ 1);
      if (!is_end) {
        mark_dense(marks, params, tile, base, count, thread, kMarkers);
        if (params.overlap != 0) await_lists(params, tile, kv_head, thread);
        sync_named(kMarkersBarrier, kMarkers);
        mark_listed(marks, params, tile, kv_head, base, count, thread, kMarkers);
      }
      if (thread == 0) {
        signals.marked[buffer.at] = {tile, kv_head, base, count, base + count == blocks};
      }
      arrive(&signals.marks_full[buffer.at]);
      buffer.advance();
    }
    // From here on all lists are there, and the counter is cleared.
    wait_for_previous_launch();
    allow_next_launch();
    if (is_end) return;
    wait_phase(&signals.is_ending, parity);
    parity ^= 1;
    if (thread == 0) signals.turn = gridDim.x + atomicAdd(turns_taken, 1);
    sync_named(kMarkersBarrier, kMarkers);
    turn = signals.turn;
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
  bool is_ending = false;
  for (;;) {
    wait_phase(&signals.marks_full[buffer.at], buffer.parity);
    const MarkedTile& marked = signals.marked[buffer.at];
    const int rows = marked.tile.rows;
    const int kv_head = marked.kv_head;
    const int base = marked.base;
    const int last = marked.tile.position + rows - 1;
    if (base == 0) {
      is_ending = false;
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
      if (!is_ending && block + kMarkAhead > last / kBlockSize) {
        if (lane == 0) arrive(&signals.is_ending);
        is_ending = true;
      }
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
    if (marked.is_last && !is_ending && lane == 0) arrive(&signals.is_ending);
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
      const Entry header = entry();
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
  // The lane that gives a stage back is the one that reads what it holds.
  __device__ __forceinline__ Entry entry() const {
    Entry found;
    if (lane_ == 0) found = signals_.entries[ring_.at];
    found.mark = __shfl_sync(kAllLanes, found.mark, 0);
    found.block = __shfl_sync(kAllLanes, found.block, 0);
    found.row = __shfl_sync(kAllLanes, found.row, 0);
    found.position = __shfl_sync(kAllLanes, found.position, 0);
    return found;
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
    const Entry found = entry();
    return {found.mark, found.block};
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
    init_barrier(&signals.is_ending, 1);
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

// For the launch behind it, which counts up from 0.
__global__ void clear_turns_kernel(int32_t* turns_taken) {
  allow_next_launch();
  wait_for_previous_launch();
  *turns_taken = 0;
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
  LaunchShape clear;
  clear.grid = dim3(1);
  clear.threads = 1;
  clear.overlap = params.overlap != 0;
  cudaError_t error =
      launch(clear_turns_kernel, clear, stream, static_cast<int32_t*>(params.workspace));
  if (error != cudaSuccess) return launch_status(op, error);
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Tiles);
  int fits = 0;
  error = count_clusters(kernel, kThreads, shape.shared_bytes, 1, &fits);
  if (error != cudaSuccess) return launch_status(op, error);
  shape.grid = dim3(static_cast<unsigned>(
      std::min<int64_t>(fits, most_tiles(batch, kWarps) * heads.num_kv_heads)));
  shape.overlap = true;
  return launch_status(op, launch(kernel, shape, stream, params, k_map, v_map));
}

}  // namespace cuda
}  // namespace minicpm41
