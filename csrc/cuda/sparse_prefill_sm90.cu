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
// with the last, and some are parted, so that no thread block idles in the end. Who works on a tile
// does not show in its rows.
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
static_assert(kTokens < kMarkBits - 1, "a mark holds a bit a token");

// Tiles lie in the 128-byte swizzle: [half of the row][row][64 numbers].
struct __align__(1024) Tiles {
  unsigned char k[kStages][kPageBytes];
  unsigned char v[kStages][kPageBytes];
  unsigned char q[kConsumers][kPageBytes];
  uint32_t marks[2][kMarkedBlocks * kMarkBits / 32];
};

// If the tiles of a call are even, each thread block begins with the earlier blocks of one, this
// with nearly all, that with hardly any; takes whole tiles while there are any; and ends with what
// another has left of its first, the largest rests being taken first. So all end together, however
// many tiles there are and whenever thread blocks begin. Sums are handed on as they are: where a
// tile is parted does not show in a row's bits.
enum Part : int { kWhole, kEarlier, kLater };

// Sums of a tile that is parted, as its threads hold them.
constexpr int kStateChunks = kOutputs / 4 + 1;
struct __align__(128) State {
  float4 chunks[kStateChunks][kConsumers * kWarpgroup];
};

// What thread blocks tell each other.
struct Shares {
  int32_t* turns_taken;  // beyond the first of each thread block
  int32_t* progress;     // of each parted tile
  int32_t* begins;       // the first block of its later part
  State* states;
  int slots;  // parted tiles at most; 0 if no tile is
};
// Thread blocks that begin their tiles together read the same keys at about the same time. Parts
// would end that, and keys that do not fit into L2 would come from memory once for each: so many
// rounds of tiles have an end too short to be worth it.
constexpr int kManyRounds = 32;
int slots_for(const SparseAttentionParams& params, const Device& device) {
  const int64_t tiles = most_tiles(params.batch, kTokens) * params.heads.num_kv_heads;
  const int64_t thread_blocks = device.multiprocessors;
  return tiles > thread_blocks && tiles < kManyRounds * thread_blocks ? device.multiprocessors : 0;
}
// States, which want the alignment, come first.
Shares shares_of(void* workspace, int slots) {
  State* states = static_cast<State*>(workspace);
  int32_t* numbers = reinterpret_cast<int32_t*>(states + slots);
  return {numbers, numbers + 1, numbers + 1 + slots, states, slots};
}

#ifdef MINICPM41_HAS_WGMMA

// Progress of a parted tile: 0, begun, and each warp that has handed on its sums. Or it had not
// been begun when the later part was due, which then is all of it.
constexpr int kBegun = 1;
constexpr int kHandedOn = 2;
constexpr int kAllHandedOn = kBegun + kConsumers * kWarps * kHandedOn;
constexpr int kNotWanted = 1 << 16;

constexpr int kMarkers = 96;  // threads that make marks: three warps
// The next tile is taken when so many blocks of positions are left of the last one. Making its
// marks takes as long as some five listed blocks, and the ring holds five more.
constexpr int kMarkAhead = 12;
// The step between the shares of thread blocks that follow each other: a prime, and of 132 about
// the golden section, which spreads any number of them evenly.
constexpr int kSpread = 83;
constexpr int kHalfBytes = kPageBytes / 2;
// Named barriers; 0 is __syncthreads.
constexpr int kMarkersBarrier = 1;
constexpr int kConsumerBarrier = 2;  // and one for each further warpgroup

// What a thread block does at a time.
struct Turn {
  Tile tile;  // rows 0: there is no more to do
  int kv_head;
  Part part;
  int slot;     // of a parted tile
  float share;  // of its earlier part
};

// Up to kMarkedBlocks blocks of one tile of one kv head.
struct MarkedTile {
  Turn turn;
  int base;   // block of the first mark
  int begin;  // from here
  int end;
  int ending;     // the first block that is near the end of the turn
  bool is_first;  // of the turn
  bool is_last;
};

// What a stage holds: a block and its mark, or, with mark 0, what the next turn is.
struct __align__(16) Entry {
  int mark;
  int block;  // header: the numbers below; rows 0 ends the work
  int row;    // header only, as is the next
  int position;

  __device__ __forceinline__ static Entry header(const Turn& turn) {
    return {0, ((turn.slot * 4 + turn.part) << 16) | (turn.kv_head * kMarkBits + turn.tile.rows),
            turn.tile.row, turn.tile.position};
  }
  // A turn ends with the next header, or with this.
  __device__ __forceinline__ static Entry end_of_turn() { return {0, kMarkBits - 1, 0, 0}; }
  __device__ __forceinline__ bool is_end_of_turn() const { return block == kMarkBits - 1; }
  __device__ __forceinline__ int rows() const { return block % kMarkBits; }
  __device__ __forceinline__ int kv_head() const { return (block & 0xffff) / kMarkBits; }
  __device__ __forceinline__ int part() const { return block >> 16 & 3; }
  __device__ __forceinline__ int slot() const { return block >> 18; }
};

struct Signals {
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint64_t marks_full[2], marks_empty[2];
  uint64_t is_ending;  // the copies of a tile are about to end
  Entry entries[kStages];
  MarkedTile marked[2];
  Cut cut;
  int turn;
  int begin;
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

// Turn `index` of the call, the same for a whole warp. The latest positions, whose lists are the
// longest, come first, as in select_blocks; later parts come last.
__device__ __forceinline__ Turn find_turn(const SparseAttentionParams& params, const Cut& cut,
                                          int index, int lane) {
  const int kv_heads = params.heads.num_kv_heads;
  const int thread_blocks = gridDim.x;
  const int tiles = cut.tiles[0] * kv_heads;
  Turn turn = {{}, 0, kWhole, 0, 0.0f};
  if (cut.is_even) {
    if (index < thread_blocks) {
      // Not in their order: those that begin early, where select_blocks had less to do, are to have
      // parts of all sizes.
      const int stride = thread_blocks % kSpread == 0 ? 1 : kSpread;
      index = index * stride % thread_blocks;
      turn.part = kEarlier;
      turn.slot = index;
      turn.share = (index + 0.5f) / thread_blocks;
    } else if (index >= tiles) {
      index -= tiles;
      if (index >= thread_blocks) return turn;
      turn.part = kLater;
      turn.slot = index;
    }
  }
  for (int size = 0; size < Cut::kSizes && turn.tile.rows == 0; ++size) {
    const int of_size = cut.tiles[size];
    if (index < of_size * kv_heads) {
      // Keys of one kv head at a time, where all read the same of them: L2 need not hold more.
      // Where tiles are parted nothing keeps in step, and both heads in turn end more evenly.
      turn.kv_head = cut.is_even ? index % kv_heads : index / of_size;
      const int tile = cut.is_even ? index / kv_heads : index % of_size;
      turn.tile = find_tile(params.batch, cut, size, of_size - 1 - tile, lane);
    }
    index -= of_size * kv_heads;
  }
  return turn;
}

// Of `count` blocks those that are marked, and the block before which `before` of them are. Called
// by whole warps.
__device__ __forceinline__ int count_marked(const uint32_t* marks, int count, int lane) {
  int marked = 0;
  for (int word = lane; 2 * word < count; word += kWarpSize) {
    marked += ((marks[word] & 0xffff) != 0) + (marks[word] >> kMarkBits != 0);
  }
  return __reduce_add_sync(kAllLanes, marked);
}
__device__ __forceinline__ int find_marked(const uint32_t* marks, int count, int before, int lane) {
  for (int first = 0; 2 * first < count; first += kWarpSize) {
    const int word = first + lane;
    const uint32_t two = 2 * word < count ? marks[word] : 0;
    const bool is_even = (two & 0xffff) != 0;
    const bool is_odd = two >> kMarkBits != 0;
    const unsigned evens = __ballot_sync(kAllLanes, is_even);
    const unsigned odds = __ballot_sync(kAllLanes, is_odd);
    if (before < __popc(evens) + __popc(odds)) {
      const unsigned lower = (1u << lane) - 1;
      const int mine = before - __popc(evens & lower) - __popc(odds & lower);
      const bool holds = mine >= 0 && mine < is_even + is_odd;
      const int owner = __ffs(__ballot_sync(kAllLanes, holds)) - 1;
      return __shfl_sync(kAllLanes, 2 * word + (mine == is_even), owner);
    }
    before -= __popc(evens) + __popc(odds);
  }
  return 0;
}

// Waits until the earlier part of a tile is done and says where the later begins. -1: it was not
// begun. Then it is not waited for: its thread block may find no room before this one ends.
__device__ __forceinline__ int take_over(const Shares& shares, int slot) {
  int32_t* progress = shares.progress + slot;
  if (atomicCAS(progress, 0, kNotWanted) == 0) return -1;
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(progress) : "memory");
  } while (seen != kAllHandedOn);
  return __ldcg(shares.begins + slot);
}

// Three warps: take turns for this thread block and mark their blocks, one ahead of the copies.
__device__ __forceinline__ void make_marks(Tiles& tiles, Signals& signals,
                                           const SparseAttentionParams& params,
                                           const Shares& shares, int thread) {
  const int lane = thread % kWarpSize;
  const bool may_part = shares.slots >= static_cast<int>(gridDim.x);
  const Cut found = cut_call(params.batch, kTokens, kWarps, params.heads.num_kv_heads, gridDim.x,
                             may_part ? long_tile(params.dense_len) : 0, lane);
  if (thread == 0) signals.cut = found;
  sync_named(kMarkersBarrier, kMarkers);
  const Cut& cut = signals.cut;
  int parity = 0;
  Cursor<2> buffer;
  // With overlap, lists are waited for one by one.
  if (params.overlap == 0) wait_for_previous_launch();
  for (int index = blockIdx.x, round = 0;; ++round) {
    Turn turn = find_turn(params, cut, index, lane);
    const Tile& tile = turn.tile;
    const bool is_end = tile.rows == 0;
    int begin = 0;
    if (turn.part == kEarlier && thread == 0) {
      atomicCAS(shares.progress + turn.slot, 0, kBegun);
    }
    if (turn.part == kLater) {
      if (thread == 0) signals.begin = take_over(shares, turn.slot);
      sync_named(kMarkersBarrier, kMarkers);
      begin = signals.begin;
      if (begin < 0) turn.part = kWhole;
      begin = max(begin, 0);
    }
    int end = is_end ? 1 : blocks_of(params.batch, tile);
    int ending = end - kMarkAhead;
    for (int base = begin / kMarkedBlocks * kMarkedBlocks; base < end; base += kMarkedBlocks) {
      const int count = min(end - base, kMarkedBlocks);
      uint32_t* marks = tiles.marks[buffer.at];
      wait_phase(&signals.marks_empty[buffer.at], buffer.parity ^ 1);
      if (!is_end) {
        mark_dense(marks, params, tile, base, count, thread, kMarkers);
        if (params.overlap != 0) await_lists(params, tile, turn.kv_head, thread);
        sync_named(kMarkersBarrier, kMarkers);
        mark_listed(marks, params, tile, turn.kv_head, base, count, thread, kMarkers);
        if (turn.part == kEarlier) {
          sync_named(kMarkersBarrier, kMarkers);
          const int wanted = static_cast<int>(count_marked(marks, count, lane) * turn.share);
          // Of more blocks than there are marks for, those that there are.
          end = count < end ? count : find_marked(marks, count, wanted, lane);
          ending = find_marked(marks, count, max(wanted - kMarkAhead, 0), lane);
          if (thread == 0) shares.begins[turn.slot] = end;
        }
      }
      if (thread == 0) {
        const int marked_end = min(end, base + kMarkedBlocks);
        signals.marked[buffer.at] = {turn,   base,          max(begin, base), marked_end,
                                     ending, base <= begin, marked_end == end};
      }
      arrive(&signals.marks_full[buffer.at]);
      buffer.advance();
    }
    // From here on all lists are there. A thread block may be done with a part before that.
    if (round > 0 || turn.part == kWhole) {
      wait_for_previous_launch();
      allow_next_launch();
    }
    if (is_end) return;
    wait_phase(&signals.is_ending, parity);
    parity ^= 1;
    if (thread == 0) signals.turn = gridDim.x + atomicAdd(shares.turns_taken, 1);
    sync_named(kMarkersBarrier, kMarkers);
    index = signals.turn;
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
    const Tile& tile = marked.turn.tile;
    const int kv_head = marked.turn.kv_head;
    const int base = marked.base;
    const int last = tile.position + tile.rows - 1;
    const auto put = [&](const Entry& entry) {
      if (lane == 0) {
        wait_phase(&signals.k_empty[ring.at], ring.parity ^ 1);
        wait_phase(&signals.v_empty[ring.at], ring.parity ^ 1);
        signals.entries[ring.at] = entry;
        arrive(&signals.k_full[ring.at]);
        arrive(&signals.v_full[ring.at]);
      }
      ring.advance();
    };
    if (marked.is_first) {
      is_ending = false;
      put(Entry::header(marked.turn));
    }
    if (tile.rows == 0) return;
    MarkedBlocks walk(
        tiles.marks[buffer.at],
        params.batch.block_tables + int64_t{tile.request} * params.batch.max_blocks + base,
        marked.begin - base, marked.end - base, params.batch.num_pages, lane);
    int block, mark, page;
    while (walk.next(&block, &mark, &page)) {
      block += base;
      if (!is_ending && block >= marked.ending) {
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
    // The sums of an earlier part are handed on before it is known what comes next: that may be a
    // later part, and wait for another thread block that waits for these.
    if (marked.is_last && marked.turn.part == kEarlier) put(Entry::end_of_turn());
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
                                      const SparseAttentionParams& params, const Shares& shares,
                                      int warpgroup, int thread)
      : tiles_(tiles),
        signals_(signals),
        params_(params),
        shares_(shares),
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
      const int rows = header.rows();
      const int kv_head = header.kv_head();
      if (header.is_end_of_turn()) continue;
      if (rows == 0) return;
      position_ = header.position + token_;
      // A warp past the tile's last row reads that row's queries; nothing is marked for it.
      load_queries(static_cast<const T*>(params_.q) +
                   (header.row + min(token_, rows - 1)) * params_.q_stride +
                   kv_head * kGroupSize * kHeadDim);
      if (header.part() == kLater) {
        take_over(shares_.states[header.slot()]);
      } else {
        state_.clear();
      }
      attend_all();
      if (header.part() == kEarlier) {
        hand_on(shares_.states[header.slot()], shares_.progress + header.slot());
      } else if (token_ < rows) {
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

  __device__ __forceinline__ void hand_on(State& shared, int32_t* progress) {
    const int thread = warpgroup_ * kWarpgroup + warp_ * kWarpSize + lane_;
#pragma unroll
    for (int i = 0; i < kOutputs; i += 4) {
      __stcg(&shared.chunks[i / 4][thread],
             make_float4(state_.out[i], state_.out[i + 1], state_.out[i + 2], state_.out[i + 3]));
    }
    __stcg(&shared.chunks[kStateChunks - 1][thread],
           make_float4(state_.peak[0], state_.peak[1], state_.sum[0], state_.sum[1]));
    __syncwarp();
    if (lane_ == 0) {
      asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(progress), "r"(kHandedOn)
                   : "memory");
    }
  }
  __device__ __forceinline__ void take_over(const State& shared) {
    const int thread = warpgroup_ * kWarpgroup + warp_ * kWarpSize + lane_;
#pragma unroll
    for (int i = 0; i < kOutputs; i += 4) {
      const float4 chunk = __ldcg(&shared.chunks[i / 4][thread]);
      state_.out[i] = chunk.x;
      state_.out[i + 1] = chunk.y;
      state_.out[i + 2] = chunk.z;
      state_.out[i + 3] = chunk.w;
    }
    const float4 chunk = __ldcg(&shared.chunks[kStateChunks - 1][thread]);
    state_.peak[0] = chunk.x;
    state_.peak[1] = chunk.y;
    state_.sum[0] = chunk.z;
    state_.sum[1] = chunk.w;
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
  const Shares& shares_;
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
                               const __grid_constant__ Shares shares,
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
      make_marks(tiles, signals, params, shares, thread);
    } else {
      copy_pages<T>(tiles, signals, params, &k_map, &v_map, thread % kWarpSize);
    }
  } else {
    grow_registers<kConsumerRegisters>();
    Consumer<T>(tiles, signals, params, shares, warpgroup, thread).run();
  }
#endif
}

// For the launch behind it, which counts up from 0 and may begin before select_blocks has ended:
// with overlap that one is what is waited for, and it has no workspace to be in the way of.
__global__ void clear_shares_kernel(const __grid_constant__ Shares shares, bool overlap) {
  if (!overlap) wait_for_previous_launch();
  if (threadIdx.x == 0) *shares.turns_taken = 0;
  for (int i = threadIdx.x; i < shares.slots; i += blockDim.x) shares.progress[i] = 0;
  __threadfence();
  __syncthreads();
  allow_next_launch();
  wait_for_previous_launch();
}

using Kernel = void (*)(SparseAttentionParams, Shares, CUtensorMap, CUtensorMap);

}  // namespace

// Compiled for any other architecture the kernel is empty and has no shared memory of its own.
bool has_sparse_prefill_sm90() {
  static const bool is_built = holds_kernel(sparse_prefill_sm90_kernel<__nv_bfloat16>);
  return is_built;
}

int64_t sparse_prefill_sm90_workspace(const SparseAttentionParams& params, const Device& device) {
  const int64_t slots = slots_for(params, device);
  return slots * (sizeof(State) + 2 * sizeof(int32_t)) + sizeof(int32_t);
}

Status sparse_prefill_sm90(const SparseAttentionParams& params, const Device& device,
                           void* stream) {
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
  const Shares shares = shares_of(params.workspace, slots_for(params, device));
  LaunchShape clear;
  clear.grid = dim3(1);
  clear.threads = kWarpgroup;
  clear.overlap = params.overlap != 0;
  cudaError_t error = launch(clear_shares_kernel, clear, stream, shares, clear.overlap);
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
  return launch_status(op, launch(kernel, shape, stream, params, shares, k_map, v_map));
}

}  // namespace cuda
}  // namespace minicpm41
