// Lists the blocks of the rows of prefill requests: log-sum-exp over K2, scores over K1, pooling,
// top-k.
//
// A warp serves one row and one kv head: the 16 query heads are the rows of its products and stay
// in registers, windows are the columns. So heads are summed, windows pooled and blocks chosen
// within the warp, and a thread block of neighbouring rows shares nothing but the tiles of windows
// that its loading warps bring in. Nothing is kept beyond one buffer of scores a warp: when it is
// full, the best so far are chosen and the rest is dropped. The bits of a row depend on its own
// windows alone, in the order of their positions.
//
// A window is stored in the page of its last key. So flat slot u = 4 * page + slot holds window u -
// 1, page b holds coarse window b - 1, and the five windows that overlap block b are the four slots
// of its page and the first slot of the next.
#include <type_traits>

#include "hopper.cuh"
#include "prefill_tiles.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

#ifdef MINICPM41_HAS_WGMMA
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

constexpr int kTileWindows = 128;
constexpr int kTileBlocks = kTileWindows / kFineSlots;  // one a lane
constexpr int kTileBytes = kTileWindows * kRowBytes;
constexpr int kLineBytes = kRowBytes / 2;  // a tile is two tiles of half the head dimension
// Half a tile holds two of the four slots of each of its blocks.
constexpr int kHalfRows = kTileWindows / 2;
constexpr int kPairs = kHalfRows / 8;  // of neighbouring columns of a thread
constexpr int kColumns = 2 * kPairs;
constexpr int kScores = 2 * kColumns;  // of a thread for half a tile: two heads
constexpr int kSums = 2;               // what a lane keeps of half a tile: two windows of its block
static_assert(kTileBlocks == kWarpSize && kFineSlots == 4, "a lane pools one block of a tile");

// Scores that a row keeps at a time before it chooses among them.
constexpr int kLaneKeys = 16;
constexpr int kKeys = kLaneKeys * kWarpSize;
// How many more than wanted may stay when it has to choose before the end: a rough choice is quick.
constexpr int kSpareKeys = kKeys / 8;

// Tiles for the last round have a multiple of this many rows, those of a product of a warpgroup.
constexpr int kRowStep = 4;

// Named barrier of the warps that have rows; 0 is __syncthreads.
constexpr int kRowsBarrier = 1;

template <bool kWgmma>
struct Shape {
  static constexpr int kRows = kWgmma ? 12 : 8;
  static constexpr int kLoadThreads = kWgmma ? 128 : 64;
  static constexpr int kThreads = kRows * kWarpSize + kLoadThreads;
  static constexpr int kStages = kWgmma ? 5 : 2;
  static constexpr int kSharedBytes =
      kStages * (kTileBytes + 2 * static_cast<int>(sizeof(uint64_t))) +
      kRows * kKeys * static_cast<int>(sizeof(uint32_t) + sizeof(int32_t));
};

// A ring of tiles: `full` when the loading warps' copies have landed, `empty` when every other warp
// has read it.
template <bool kWgmma>
struct Ring {
  uint32_t tiles;
  uint32_t barriers;
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ uint32_t tile() const { return tiles + stage * kTileBytes; }
  __device__ __forceinline__ uint32_t full() const { return barriers + stage * 16; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + stage * 16 + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == Shape<kWgmma>::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// ---- which rows, which windows ----

// Tile `turn` of the call, rows 0 beyond the last. The latest positions, which read the most, come
// first; both kv heads of a tile are neighbours. The whole warp calls it.
__device__ __forceinline__ Tile tile_of_turn(const Batch& batch, const Cut& cut, int num_kv_heads,
                                             int turn, int lane, int* kv_head) {
  int index = turn / num_kv_heads;
  *kv_head = turn % num_kv_heads;
  for (int size = 0; size < Cut::kSizes; ++size) {
    const int tiles = cut.tiles[size];
    if (index < tiles) return find_tile(batch, cut, size, tiles - 1 - index, lane);
    index -= tiles;
  }
  return {};
}

// The slots a row reads. Tiles of slots begin at multiples of kTileWindows.
struct Sweep {
  bool is_sparse;  // whether it chooses at all
  int first_local;
  int last_coarse;  // slot; none when 0
  int last_fine;    // slot, of those that are scored
  int coarse_tiles;
  int first_fine_tile;
  int fine_tiles;

  __device__ __forceinline__ Sweep(const SelectBlocksParams& params, int position) {
    const int own = position / kBlockSize;
    is_sparse = own + 1 > params.budget && position + 1 >= params.dense_len;
    first_local = own - params.local_blocks + 1;
    last_coarse =
        min(max(0, (position + 1) / kCoarseKernelStride - 1), params.batch.max_blocks - 1);
    // The first local block lends its first slot to the candidate before it.
    last_fine = min(min((position + 1) / kKernelStride - 1, kFineSlots * first_local),
                    kFineSlots * params.batch.max_blocks - 1);
    const bool chooses = is_sparse && params.budget > params.init_blocks + params.local_blocks;
    coarse_tiles = chooses && last_coarse > 0 ? last_coarse / kTileWindows + 1 : 0;
    first_fine_tile = params.init_blocks / kTileBlocks;
    fine_tiles = chooses ? first_local / kTileBlocks + 1 - first_fine_tile : 0;
  }
};

// The row of a tile that holds a slot: product h takes slots 2 h and 2 h + 1 of every page, and
// lane l gets those of page l.
__host__ __device__ constexpr int row_of_slot(int slot) {
  return slot / 2 % 2 * kHalfRows + slot / 4 * 2 + slot % 2;
}

// Brings in the tiles of all row tiles of this thread block.
template <bool kWgmma>
__device__ __forceinline__ void load_tiles(const SelectBlocksParams& params, const Cut& cut,
                                           Ring<kWgmma> ring) {
  constexpr int kRows = Shape<kWgmma>::kRows;
  constexpr int kSlotsAtOnce = Shape<kWgmma>::kLoadThreads / kRowChunks;
  constexpr int kCopies = 16;  // a lane looks up the page of one of them
  constexpr int kPart = kCopies * kSlotsAtOnce;
  constexpr int kParts = kTileWindows / kPart;
  static_assert(kTileWindows % kPart == 0, "a tile is loaded in equal parts");
  const int thread = threadIdx.x - kRows * kWarpSize;
  const int lane = thread % kWarpSize;
  const int chunk = thread % kRowChunks;
  const int my_slot = thread / kRowChunks;
  const int my_row = row_of_slot(my_slot);
  const uint32_t target = chunk / 8 * (kTileBytes / 2) + my_row * kLineBytes +
                          ((chunk % 8) ^ (my_row % 8)) * kChunkBytes;
  const int kv_heads = params.heads.num_kv_heads;

#pragma unroll 1
  for (int turn = blockIdx.x;; turn += gridDim.x) {
    int kv_head;
    const Tile rows = tile_of_turn(params.batch, cut, kv_heads, turn, lane, &kv_head);
    if (rows.rows == 0) return;
    const Sweep sweep(params, rows.position + rows.rows - 1);
    const int32_t* pages =
        params.batch.block_tables + int64_t{rows.request} * params.batch.max_blocks;
    const int parts = (sweep.coarse_tiles + sweep.fine_tiles) * kParts;
    const auto first_slot_of = [&](int part) {
      const int tile = part / kParts;
      return part % kParts * kPart +
             kTileWindows * (tile < sweep.coarse_tiles
                                 ? tile
                                 : sweep.first_fine_tile + tile - sweep.coarse_tiles);
    };
    // The page of one copy; they are looked up a part ahead of the copies.
    const auto look_up = [&](int part) {
      const bool is_coarse = part < sweep.coarse_tiles * kParts;
      const int slot = first_slot_of(part) + my_slot + lane % kCopies * kSlotsAtOnce;
      const int block = is_coarse ? slot : slot / kFineSlots;
      const int last = is_coarse ? sweep.last_coarse : sweep.last_fine / kFineSlots;
      return part < parts && block <= last ? __ldg(pages + block) : -1;
    };
    int next_page = look_up(0);
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const bool is_coarse = part < sweep.coarse_tiles * kParts;
      const int first_slot = first_slot_of(part) + my_slot;
      const int last_slot = is_coarse ? sweep.last_coarse : sweep.last_fine;
      const int page_slots = is_coarse ? kCoarseSlots : kFineSlots;
      const char* cache = static_cast<const char*>(is_coarse ? params.k2_cache : params.k1_cache) +
                          (kv_head * page_slots + (my_slot & (page_slots - 1))) * kRowBytes +
                          chunk * kChunkBytes;
      const int64_t page_bytes = int64_t{kv_heads} * page_slots * kRowBytes;
      const bool has_page =
          static_cast<uint32_t>(next_page) < static_cast<uint32_t>(params.batch.num_pages);
      const int page = has_page ? next_page : -1;
      next_page = look_up(part + 1);
      const bool is_whole = __all_sync(
          kAllLanes, has_page && first_slot > 0 && first_slot + kPart - kSlotsAtOnce <= last_slot);
      if (part % kParts == 0) wait_phase(ring.empty(), ring.phase ^ 1);
      const uint32_t part_target = ring.tile() + part % kParts * (kPart / 2 * kLineBytes) + target;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int owner = __shfl_sync(kAllLanes, page, (lane & kCopies) + i);
        // The bits of a slot's row are those of its two parts.
        const int row = row_of_slot(i * kSlotsAtOnce);
        const uint32_t copy_target = (part_target ^ (row % 8 * kChunkBytes)) + row * kLineBytes;
        if (is_whole) {
          copy_chunk(copy_target, cache + owner * page_bytes, true);
        } else {
          const int slot = first_slot + i * kSlotsAtOnce;
          copy_chunk(copy_target, cache + max(owner, 0) * page_bytes,
                     owner >= 0 && slot > 0 && slot <= last_slot);
        }
      }
      if ((part + 1) % kParts == 0) {
        arrive_when_copied(ring.full());
        ring.advance();
      }
    }
  }
}

// ---- products ----

// scores[4 n + 2 r + e] is of head lane / 4 + 8 r and row 8 n + 2 (lane % 4) + e of `rows`.

#ifdef MINICPM41_HAS_WGMMA
#define MINICPM41_EIGHT(i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MINICPM41_SCORES                                                            \
  MINICPM41_EIGHT(0), MINICPM41_EIGHT(8), MINICPM41_EIGHT(16), MINICPM41_EIGHT(24), \
      MINICPM41_EIGHT(32), MINICPM41_EIGHT(40), MINICPM41_EIGHT(48), MINICPM41_EIGHT(56)
#define MINICPM41_WGMMA(type)                                                                   \
  asm volatile(                                                                                 \
      "{ .reg .pred adds; setp.ne.b32 adds, %69, 0;\n"                                          \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                              \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "   \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "   \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, "     \
      "adds, 1, 1, 0; }"                                                                        \
      : MINICPM41_SCORES                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds)                           \
      : "memory")

template <typename T>
__device__ __forceinline__ void wgmma_64x128x16(float (&d)[2 * kScores], const uint32_t (&a)[4],
                                                uint64_t b, int adds) {
  if constexpr (std::is_same_v<T, __half>) {
    MINICPM41_WGMMA("f16");
  } else {
    MINICPM41_WGMMA("bf16");
  }
}
#endif

template <typename T>
__device__ __forceinline__ void multiply_tile(float (&d)[2 * kScores],
                                              const uint32_t (&q)[kKSteps][4], uint32_t rows) {
#ifdef MINICPM41_HAS_WGMMA
  // Lines of 128 bytes, swizzled in groups of 8: 1024 bytes from one group to the next.
  const uint64_t descriptor = uint64_t{(rows & 0x3ffff) >> 4} | uint64_t{1} << 16 |
                              uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
  publish_writes();  // wgmma reads what cp.async wrote
  begin_products();
#pragma unroll
  for (int step = 0; step < kKSteps; ++step) {
    const int offset = step / 4 * (kTileBytes / 2) + step % 4 * 32;
    wgmma_64x128x16<T>(d, q[step], descriptor + (offset >> 4), step > 0);
  }
  end_products();
  asm volatile("wgmma.wait_group.sync.aligned 0;" : MINICPM41_SCORES::"memory");
#undef MINICPM41_WGMMA
#undef MINICPM41_SCORES
#undef MINICPM41_EIGHT
#endif
}

// Half a tile, where there is no wgmma.
template <typename T>
__device__ __forceinline__ void multiply_half(float (&scores)[kScores],
                                              const uint32_t (&q)[kKSteps][4], uint32_t rows,
                                              int lane) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) scores[i] = 0.0f;
#pragma unroll
  for (int step = 0; step < kKSteps; step += 2) {
    const int chunk = 2 * step + lane / 8;
    const uint32_t line = rows + chunk / 8 * (kTileBytes / 2) + lane % 8 * kLineBytes +
                          ((chunk % 8) ^ (lane % 8)) * kChunkBytes;
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      uint32_t windows[4];
      ldmatrix_x4(windows, line + n * 8 * kLineBytes);
      float (&part)[4] = *reinterpret_cast<float (*)[4]>(&scores[4 * n]);
      mma_16x8x16<T>(part, q[step], windows[0], windows[1]);
      mma_16x8x16<T>(part, q[step + 1], windows[2], windows[3]);
    }
  }
}

// Leaves a tile to the loading warps.
template <bool kWgmma>
__device__ __forceinline__ void pass(Ring<kWgmma>& ring, int lane) {
  __syncwarp();
  if (lane == 0) arrive(ring.empty());
  ring.advance();
}

// Calls use(tile, half, scores) for the next tiles of the ring: for both halves of a tile at once,
// or one after the other.
template <typename T, bool kWgmma, typename Use>
__device__ __forceinline__ void for_each_tile(Ring<kWgmma>& ring, const uint32_t (&q)[kKSteps][4],
                                              int tiles, int lane, Use use) {
  constexpr std::integral_constant<int, 0> kFirst;
  constexpr std::integral_constant<int, 1> kSecond;
  const auto release = [&] { pass(ring, lane); };
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    wait_phase(ring.full(), ring.phase);
    if constexpr (kWgmma) {
      float scores[2 * kScores];
      multiply_tile<T>(scores, q, ring.tile());
      release();
      use(tile, kFirst, scores);
    } else {
      float scores[kScores];
      multiply_half<T>(scores, q, ring.tile(), lane);
      use(tile, kFirst, scores);
      multiply_half<T>(scores, q, ring.tile() + kHalfRows * kLineBytes, lane);
      release();
      use(tile, kSecond, scores);
    }
  }
}

// ---- the normaliser ----

// The sums of two heads, over the columns of one thread.
struct LogSumExp {
  float peak[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  template <int kCount>
  __device__ __forceinline__ void add(const float (&scores)[kCount], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = peak[r];
#pragma unroll
      for (int c = 0; c < kCount / 2; ++c) now = fmaxf(now, scores[c / 2 * 4 + 2 * r + c % 2]);
      const float base = now == -INFINITY ? 0.0f : now * scale_log2;
      float odd = 0.0f;
      float even = sum[r] * exp2_approx(peak[r] * scale_log2 - base);
#pragma unroll
      for (int c = 0; c < kCount / 2; c += 2) {
        even += exp2_approx(scores[c / 2 * 4 + 2 * r] * scale_log2 - base);
        odd += exp2_approx(scores[c / 2 * 4 + 2 * r + 1] * scale_log2 - base);
      }
      peak[r] = now;
      sum[r] = even + odd;
    }
  }
  // Over the four threads that hold the same heads; 0 without any window: then there are at most
  // two blocks, and any constant ranks them alike.
  __device__ __forceinline__ float log2_of(int r, float scale_log2) {
    float all = peak[r];
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      all = fmaxf(all, __shfl_xor_sync(kAllLanes, all, offset));
    }
    if (all == -INFINITY) return 0.0f;
    float total = sum[r] * exp2_approx((peak[r] - all) * scale_log2);
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      total += __shfl_xor_sync(kAllLanes, total, offset);
    }
    return all * scale_log2 + log2_approx(total);
  }
};

// ---- scores of blocks ----

// Lanes that differ in bit `lanes` combine their columns and keep half of them each.
template <int kCount, typename Op>
__device__ __forceinline__ void halve_columns(const float (&columns)[2 * kCount],
                                              float (&out)[kCount], int lane, int lanes, Op op) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool is_upper = lane & lanes;
    const float sent = is_upper ? columns[i] : columns[i + kCount];
    const float kept = is_upper ? columns[i + kCount] : columns[i];
    out[i] = op(kept, __shfl_xor_sync(kAllLanes, sent, lanes));
  }
}

// Combines the columns of the eight threads that hold the other heads; lane l keeps those of block
// l of the tile.
template <typename Op>
__device__ __forceinline__ void reduce_columns(const float (&columns)[kColumns],
                                               float (&out)[kSums], int lane, Op op) {
  float half[kColumns / 2];
  float quarter[kColumns / 4];
  halve_columns(columns, half, lane, 16, op);
  halve_columns(half, quarter, lane, 8, op);
  halve_columns(quarter, out, lane, 4, op);
}

// The way back: every thread gets the value of each of its columns.
__device__ __forceinline__ void spread_columns(const float (&kept)[kSums],
                                               float (&columns)[kColumns], int lane) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const float other = __shfl_xor_sync(kAllLanes, kept[i], 4);
    columns[i] = lane & 4 ? other : kept[i];
    columns[i + kSums] = lane & 4 ? kept[i] : other;
  }
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    const float other = __shfl_xor_sync(kAllLanes, columns[i], 8);
    columns[i + kColumns / 4] = lane & 8 ? columns[i] : other;
    columns[i] = lane & 8 ? other : columns[i];
  }
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    const float other = __shfl_xor_sync(kAllLanes, columns[i], 16);
    columns[i + kColumns / 2] = lane & 16 ? columns[i] : other;
    columns[i] = lane & 16 ? other : columns[i];
  }
}

// Windows are ranked by integers that order as the sum over heads of exp2(score - normaliser): its
// bits where that is a number far from either end of fp32, and beyond by its logarithm. 0 is no
// window.
constexpr float kLeastSum = 0x1p-100f;
constexpr uint32_t kSumKeys = 0x40000000u;
constexpr uint32_t kLeastSumKey = kSumKeys + (27u << 23);
constexpr uint32_t kInfinityKey = kSumKeys + (255u << 23);
constexpr uint32_t kLeastKey = 1;

__device__ __forceinline__ bool is_plain(float sum) { return sum >= kLeastSum && sum < INFINITY; }
__device__ __forceinline__ uint32_t key_of_sum(float sum) {
  return __float_as_uint(sum) + kSumKeys;
}
__device__ __forceinline__ uint32_t key_of_log2(float log2_sum) {
  if (!(log2_sum >= -3e38f)) return kLeastKey;
  return log2_sum > 0.0f ? kInfinityKey + (__float_as_uint(log2_sum) - __float_as_uint(126.0f))
                         : kLeastSumKey - (__float_as_uint(-log2_sum) - __float_as_uint(100.0f));
}

// exp2(score - normaliser) of the two heads, or of what remains of them above `base`.
struct HeadTerms {
  float scale_log2;
  float lse[2];

  __device__ __forceinline__ float score(const float* scores, int column, int r) const {
    return scores[column / 2 * 4 + column % 2 + 2 * r] * scale_log2 - lse[r];
  }
};

// Keys of the four windows of the lane's block, two from each half of the tile, 0 for those with a
// bit in `unused`.
template <int kHalves>
__device__ __forceinline__ void rank_windows(const float (&scores)[kHalves * kScores],
                                             const HeadTerms& terms, unsigned unused, int lane,
                                             uint32_t (&keys)[kHalves * kSums]) {
  const auto add = [](float x, float y) { return x + y; };
  float sums[kHalves][kSums];
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    float columns[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      columns[c] = exp2_approx(terms.score(scores + h * kScores, c, 0)) +
                   exp2_approx(terms.score(scores + h * kScores, c, 1));
    }
    reduce_columns(columns, sums[h], lane, add);
  }
  bool is_extreme = false;
#pragma unroll
  for (int i = 0; i < kHalves * kSums; ++i) {
    const float sum = sums[i / kSums][i % kSums];
    const bool is_used = !(unused >> i & 1);
    is_extreme |= is_used && !is_plain(sum);
    keys[i] = is_used ? key_of_sum(sum) : 0;
  }
  if (!__any_sync(kAllLanes, is_extreme)) return;

  // Relative to the largest term of each window.
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const float* half = scores + h * kScores;
    float columns[kColumns];
    float peaks[kSums];
    float rest[kSums];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      columns[c] = fmaxf(terms.score(half, c, 0), terms.score(half, c, 1));
    }
    reduce_columns(columns, peaks, lane, [](float x, float y) { return fmaxf(x, y); });
    spread_columns(peaks, columns, lane);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      columns[c] = exp2_approx(terms.score(half, c, 0) - columns[c]) +
                   exp2_approx(terms.score(half, c, 1) - columns[c]);
    }
    reduce_columns(columns, rest, lane, add);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      uint32_t& key = keys[h * kSums + s];
      if (key != 0 && !is_plain(sums[h][s])) key = key_of_log2(peaks[s] + log2_approx(rest[s]));
    }
  }
}

// ---- top-k ----

// Of `count` keys, in the order of their blocks, the largest, ties to the lower block: `wanted` of
// them, or up to `most` if that is found sooner. Writes their blocks, ascending, to `list`, which
// may be `blocks`, and their keys to the front of `keys`; says how many, and the key that later
// blocks must surpass to be among the `wanted`. At least `wanted` keys are there.
struct Chosen {
  int count;
  uint32_t threshold;
};
__device__ __forceinline__ Chosen choose(uint32_t* keys, const int32_t* blocks, int count,
                                         int wanted, int most, int lane, int32_t* list) {
  // A run of blocks for each lane.
  constexpr int kStep = 4;
  const int run = (count + kWarpSize - 1) / kWarpSize;
  const int begin = lane * run;
  const int mine_count = min(max(count - begin, 0), run);
  uint32_t mine[kLaneKeys];
  uint32_t largest = 0;
  uint32_t least = 0xffffffffu;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    mine[i] = 0;
    if (i < mine_count) {
      mine[i] = keys[begin + i];
      least = min(least, mine[i]);
    }
    largest = max(largest, mine[i]);
  }
  // `reach` keys reach `low`, at least as many as wanted; `above` reach `high`, fewer than wanted.
  // Three keys in between are tried at a time: by quarters, and every other time around where the
  // aim should be, for the number of keys falls about exponentially.
  uint32_t low = __reduce_min_sync(kAllLanes, least);
  uint32_t high = __reduce_max_sync(kAllLanes, largest) + 1;
  int reach = count;
  int above = 0;
  bool goes_by_quarters = false;
  const float log2_aim = log2_approx((wanted + most) * 0.5f);
  constexpr int kCountBits = 10;
  constexpr int kCountMask = (1 << kCountBits) - 1;
  static_assert(kKeys <= kCountMask, "three counts fit one number");
#pragma unroll 1
  while (high - low > 1 && reach > most) {
    const float range = static_cast<float>(high - low);
    float share = 0.5f;
    float spread = 0.25f;
    if (!goes_by_quarters) {
      const float log2_reach = log2_approx(static_cast<float>(reach));
      const float per_octave = __fdividef(1.0f, log2_reach - log2_approx(above + 0.5f));
      share = (log2_reach - log2_aim) * per_octave;
      spread = 0.2f * per_octave;
    }
    goes_by_quarters = !goes_by_quarters;
    const uint32_t most_ahead = high - low - 1;
    uint32_t tried[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const float ahead = fmaxf((share + (i - 1) * spread) * range, 1.0f);
      tried[i] = low + min(static_cast<uint32_t>(ahead), most_ahead);
    }
    int reached = 0;
#pragma unroll
    for (int i = 0; i < kLaneKeys; i += kStep) {
      if (i < run) {
#pragma unroll
        for (int k = i; k < i + kStep; ++k) {
          if (mine[k] >= tried[0]) reached += 1;
          if (mine[k] >= tried[1]) reached += 1 << kCountBits;
          if (mine[k] >= tried[2]) reached += 1 << 2 * kCountBits;
        }
      }
    }
    reached = __reduce_add_sync(kAllLanes, reached);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int this_many = reached >> i * kCountBits & kCountMask;
      if (this_many >= wanted) {
        low = tried[i];
        reach = this_many;
      }
    }
#pragma unroll
    for (int i = 2; i >= 0; --i) {
      const int this_many = reached >> i * kCountBits & kCountMask;
      if (this_many < wanted) {
        high = tried[i];
        above = this_many;
      }
    }
  }
  // Keys equal to `low` that are taken, if not all that reach it.
  const int ties = reach > most ? wanted - above : reach;

  // One sum carries the counts above and at the threshold.
  constexpr int kTiedShift = 16;
  constexpr int kAboveMask = (1 << kTiedShift) - 1;
  int counts = 0;
#pragma unroll
  for (int i = 0; i < kLaneKeys; i += kStep) {
    if (i < run) {
#pragma unroll
      for (int k = i; k < i + kStep; ++k) {
        counts += mine[k] > low;
        counts += (mine[k] == low) << kTiedShift;
      }
    }
  }
  int before = counts;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += other;
  }
  before -= counts;
  int tied = before >> kTiedShift;
  int place = (before & kAboveMask) + min(tied, ties);
  int32_t ids[kLaneKeys];
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) ids[i] = i < mine_count ? blocks[begin + i] : 0;
  __syncwarp();  // everything is read before it is overwritten
#pragma unroll
  for (int i = 0; i < kLaneKeys; i += kStep) {
    if (i < run) {
#pragma unroll
      for (int k = i; k < i + kStep; ++k) {
        const bool is_tied = mine[k] == low;
        const bool is_taken = mine[k] > low || (is_tied && tied < ties);
        if (is_taken) keys[place] = mine[k];
        if (is_taken) list[place] = ids[k];
        place += is_taken;
        tied += is_tied;
      }
    }
  }
  __syncwarp();
  return {reach > most ? wanted : reach, low};
}

// ---- rows ----

// Marks the lists of this thread block as not there; called by kWarps warps.
template <int kWarps>
__device__ __forceinline__ void forget_lists(const SelectBlocksParams& params, const Cut& cut) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  for (int turn = blockIdx.x + warp * gridDim.x;; turn += kWarps * gridDim.x) {
    int kv_head;
    const Tile rows =
        tile_of_turn(params.batch, cut, params.heads.num_kv_heads, turn, lane, &kv_head);
    if (rows.rows == 0) return;
    if (lane < rows.rows) {
      const int64_t row = int64_t{kv_head} * params.batch.num_tokens + rows.row + lane;
      params.topk_idx[(row + 1) * params.budget - 1] = kNotListed;
    }
  }
}

template <typename T, bool kWgmma>
__device__ __forceinline__ void select_rows(const SelectBlocksParams& params, const Cut& cut,
                                            Ring<kWgmma> ring, uint32_t* keys) {
  constexpr int kRows = Shape<kWgmma>::kRows;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int budget = params.budget;
  const int wanted = budget - params.init_blocks - params.local_blocks;
  const float scale_log2 = params.softmax_scale * kLog2e;
  keys += warp * kKeys;
  int32_t* blocks = reinterpret_cast<int32_t*>(keys + kRows * kKeys);  // of this warp, too

#pragma unroll 1
  for (int turn = blockIdx.x;; turn += gridDim.x) {
    int kv_head;
    const Tile rows =
        tile_of_turn(params.batch, cut, params.heads.num_kv_heads, turn, lane, &kv_head);
    if (rows.rows == 0) return;
    const Sweep all(params, rows.position + rows.rows - 1);
    if (warp / kRowStep * kRowStep >= rows.rows) {  // so the others of its warpgroup
#pragma unroll 1
      for (int tile = all.coarse_tiles + all.fine_tiles; tile > 0; --tile) {
        wait_phase(ring.full(), ring.phase);
        pass(ring, lane);
      }
      continue;
    }
    const bool exists = warp < rows.rows;
    const int position = rows.position + warp;
    const Sweep mine(params, position);
    const int token = rows.row + warp;
    const int list_row = kv_head * params.batch.num_tokens + token;
    const auto list_at = [&](int place) {
      return params.topk_idx + int64_t{list_row} * budget + place;
    };
    if (exists) {
      int32_t* list = list_at(0);
      if (mine.is_sparse) {
        for (int i = lane; i < params.init_blocks; i += kWarpSize) list[i] = i;
        list += budget - params.local_blocks;
        for (int i = lane; i < params.local_blocks - 1; i += kWarpSize) {
          list[i] = mine.first_local + i;
        }
      } else {
        const int own = position / kBlockSize;
        for (int i = lane; i < budget - 1; i += kWarpSize) list[i] = i <= own ? i : -1;
      }
    }
    const auto publish = [&](int last_block) {
      __syncwarp();
      if (lane == 0) publish_list(list_at(budget - 1), last_block);
    };
    const bool chooses = exists && mine.fine_tiles > 0;
    if (exists && !chooses) {
      const int own = position / kBlockSize;
      publish(mine.is_sparse ? own : own < budget - 1 ? -1 : budget - 1);
    }

    uint32_t q[kKSteps][4] = {};
    if (chooses) {
      load_q<T>(q,
                static_cast<const T*>(params.q) + token * params.q_stride +
                    kv_head * kGroupSize * kHeadDim,
                lane);
    }

    LogSumExp normaliser;
    for_each_tile<T>(ring, q, all.coarse_tiles, lane, [&](int tile, auto half, auto& scores) {
      constexpr int kHalves = sizeof(scores) / sizeof(float[kScores]);
      const int first_slot = tile * kTileWindows;
      if (!chooses || first_slot > mine.last_coarse) return;
      if (tile == 0 || first_slot + kTileWindows - 1 > mine.last_coarse) {
#pragma unroll
        for (int c = 0; c < kHalves * kColumns; ++c) {
          const int slot = first_slot + c % kColumns / 2 * 16 + lane % 4 * 4 +
                           2 * (half.value + c / kColumns) + c % 2;
          const int i = c / 2 * 4 + c % 2;
          if (slot == 0 || slot > mine.last_coarse) scores[i] = scores[i + 2] = -INFINITY;
        }
      }
      normaliser.add(scores, scale_log2);
    });
    const HeadTerms terms = {
        scale_log2, {normaliser.log2_of(0, scale_log2), normaliser.log2_of(1, scale_log2)}};

    // A block's key takes the first window of the next one, so that the last one of a tile waits.
    int count = 0;
    uint32_t threshold = 0;
    uint32_t waiting = 0;
    uint32_t windows[kFineSlots];
    for_each_tile<T>(ring, q, all.fine_tiles, lane, [&](int tile, auto half, auto& scores) {
      const int first_slot = (all.first_fine_tile + tile) * kTileWindows;
      if (!chooses || first_slot / kFineSlots > mine.first_local) return;
      constexpr int kHalves = sizeof(scores) / sizeof(float[kScores]);
      unsigned unused = 0;
      if (first_slot == 0 || first_slot + kTileWindows - 1 > mine.last_fine) {
#pragma unroll
        for (int s = 0; s < kHalves * kSums; ++s) {
          const int slot = first_slot + kFineSlots * lane + half.value * kSums + s;
          unused |= static_cast<unsigned>(slot == 0 || slot > mine.last_fine) << s;
        }
      }
      rank_windows<kHalves>(
          scores, terms, unused, lane,
          reinterpret_cast<uint32_t (&)[kHalves * kSums]>(windows[half.value * kSums]));
      if (half.value + kHalves < 2) return;

      const uint32_t own = max(max(windows[0], windows[1]), max(windows[2], windows[3]));
      const uint32_t before = __shfl_sync(kAllLanes, own, (lane + kWarpSize - 1) % kWarpSize);
      uint32_t key = max(lane == 0 ? waiting : before, windows[0]);
      waiting = before;
      const int first_block = first_slot / kFineSlots - 1;
      const int block = first_block + lane;
      if (first_block < params.init_blocks || first_block + kTileBlocks > mine.first_local) {
        const bool is_candidate = block >= params.init_blocks && block < mine.first_local;
        key = is_candidate ? max(key, kLeastKey) : 0;
      }
      const unsigned added = __ballot_sync(kAllLanes, key > threshold);
      if (key > threshold) {
        const int place = count + __popc(added & ((1u << lane) - 1));
        keys[place] = key;
        blocks[place] = block;
      }
      count += __popc(added);
      if (count + kTileBlocks > kKeys) {
        const Chosen chosen =
            choose(keys, blocks, count, wanted, wanted + kSpareKeys, lane, blocks);
        count = chosen.count;
        threshold = chosen.threshold;
      }
    });
    if (chooses) {
      choose(keys, blocks, count, wanted, wanted, lane, list_at(params.init_blocks));
      publish(mine.first_local + params.local_blocks - 1);
    }
  }
}

// ---- the kernel ----

// Compiled to nothing that can be launched for the architectures that the other instruction serves.
template <typename T, bool kWgmma>
__global__ void __launch_bounds__(kWgmma == kHasWgmma ? Shape<kWgmma>::kThreads : kWarpSize, 1)
    select_blocks_prefill_kernel(const __grid_constant__ SelectBlocksParams params) {
  if constexpr (kWgmma == kHasWgmma) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ Cut cut;
    constexpr int kRows = Shape<kWgmma>::kRows;
    constexpr int kStages = Shape<kWgmma>::kStages;
    uint32_t* keys = reinterpret_cast<uint32_t*>(shared + kStages * kTileBytes);
    Ring<kWgmma> ring;
    ring.tiles = shared_address(shared);
    ring.barriers = shared_address(keys + 2 * kRows * kKeys);
    if (threadIdx.x == 0) {
      if (ring.tiles % 1024 != 0) __trap();  // the swizzle goes by addresses
      for (int stage = 0; stage < kStages; ++stage) {
        init_barrier(ring.barriers + stage * 16, Shape<kWgmma>::kLoadThreads);
        init_barrier(ring.barriers + stage * 16 + 8, kRows);
      }
      publish_barriers();
    }
    if (threadIdx.x / kWarpSize == 1) {
      const int lane = threadIdx.x % kWarpSize;
      // On multiprocessors that have one tile less sparse_prefill_sm90 begins, and evens that out.
      const Cut found = cut_call(params.batch, kRows, kRowStep, params.heads.num_kv_heads,
                                 gridDim.x, kWgmma ? long_tile(params.dense_len) : 0, lane);
      if (lane == 0) cut = found;
    }
    wait_for_previous_launch();
    __syncthreads();
    if (threadIdx.x >= kRows * kWarpSize) {
#ifdef MINICPM41_HAS_WGMMA
      shrink_registers<24>();
#endif
      load_tiles<kWgmma>(params, cut, ring);
    } else {
#ifdef MINICPM41_HAS_WGMMA
      grow_registers<160>();
#endif
      forget_lists<kRows>(params, cut);
      __threadfence();
      sync_named(kRowsBarrier, kRows * kWarpSize);
      // The next launch finds all done that this one had to wait for, and no list of an older step.
      if (threadIdx.x == 0) allow_next_launch();
      select_rows<T, kWgmma>(params, cut, ring, keys);
    }
  }
}

template <bool kWgmma>
Status launch_rows(const SelectBlocksParams& params, const Device& device, void* stream,
                   bool* is_compiled) {
  const char* op = "select_blocks";
  using Kernel = void (*)(SelectBlocksParams);
  const Kernel kernel = params.heads.dtype == kFloat16
                            ? Kernel{select_blocks_prefill_kernel<__half, kWgmma>}
                            : Kernel{select_blocks_prefill_kernel<__nv_bfloat16, kWgmma>};
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return launch_status(op, error);
  *is_compiled = attributes.maxThreadsPerBlock >= Shape<kWgmma>::kThreads;
  if (!*is_compiled) return {};

  LaunchShape shape;
  shape.threads = Shape<kWgmma>::kThreads;
  shape.shared_bytes = Shape<kWgmma>::kSharedBytes;
  int fits = 0;
  error = count_clusters(kernel, shape.threads, shape.shared_bytes, 1, &fits);
  if (error != cudaSuccess) return launch_status(op, error);
  shape.grid = dim3(static_cast<unsigned>(std::min<int64_t>(
      std::max(fits, 1), most_tiles(params.batch, kRowStep) * params.heads.num_kv_heads)));
  shape.overlap = device.has_clusters();  // with select_blocks_decode
  return launch_status(op, launch(kernel, shape, stream, params));
}

}  // namespace

Status select_blocks_prefill(const SelectBlocksParams& params, const Device& device, void* stream) {
  const int wanted = params.budget - params.init_blocks - params.local_blocks;
  const int most = kKeys - kSpareKeys - kTileBlocks;
  Check check("select_blocks");
  check.require(wanted <= most, "budget", std::to_string(params.budget),
                "at most " + std::to_string(most) + " more than the " +
                    std::to_string(params.init_blocks + params.local_blocks) +
                    " initial and local blocks, for prefill on a GPU");
  if (!check.ok()) return check.status();
  bool is_compiled = false;
  Status status;
  if (device.has_clusters()) status = launch_rows<true>(params, device, stream, &is_compiled);
  if (status.ok() && !is_compiled) {
    status = launch_rows<false>(params, device, stream, &is_compiled);
  }
  return status;
}

}  // namespace cuda
}  // namespace minicpm41
