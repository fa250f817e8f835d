// out = x W^T for up to 64 tokens, W in low-bit tiles, on every GPU: the kernel behind
// w2_linear.cu, w4_linear.cu and w8_linear.cu where no kernel of Hopper's own is faster
// (low_bit_linear_sm90.cuh, low_bit_linear_even_shares.cuh, low_bit_linear_few_tokens.cuh,
// low_bit_linear_one_token.cuh).
//
// Sixteen rows of W are operand A of mma.m16n8k16, eight tokens operand B, so a code becomes an
// operand by a mask and one subtraction, without a shuffle; the levels are exact in T and a group's
// scale multiplies its sum in fp32. One warp copies codes, scales and x into a ring of stages,
// ahead as far as shared memory reaches; the other warps split a stage's rows and its columns and
// add up in fixed order. Where few blocks have work the blocks of a cluster split the columns again
// and add up through each other's shared memory, in the order of their ranks: the result is
// deterministic.
#pragma once

#include "barriers.cuh"

namespace minicpm41 {
namespace cuda {

struct LinearKernelParams {
  const uint8_t* qweight;
  const uint16_t* scales;
  // [in_features / kTileColumns, num_tokens, kTileColumns], the Hadamard transform taken; in row r
  // the chunk of 16 bytes i lies at i ^ r % 8, so that eight rows lie in different banks. One token
  // is as it was.
  const void* x;
  void* out;
  int32_t num_tokens;
  int32_t out_features;
  int32_t in_features;
  int32_t group;
  int32_t group_shift;  // columns to groups; a whole row is one
  int32_t zero;
  int32_t num_stages;
};

// What a launch of one of the kernels below needs to know about it.
struct LinearKernel {
  void (*kernel)(LinearKernelParams);
  int max_tokens;
  int block_tiles;  // tiles of kTileRows rows a block works on at a time
  int k_warps;      // tiles of kTileColumns columns a stage holds
  int threads;
  int sum_bytes;  // shared memory for the sums of the warps that split columns
};

// The kernel for `num_tokens`, instantiated in w2_linear.cu, w4_linear.cu and w8_linear.cu. With
// many rows a warp takes two tiles of them at a time.
LinearKernel w2_linear_kernel(int32_t dtype, int num_tokens, bool has_many_rows);
LinearKernel w4_linear_kernel(int32_t dtype, int num_tokens, bool has_many_rows);
LinearKernel w8_linear_kernel(int32_t dtype, int num_tokens, bool has_many_rows);

constexpr int kXRowBytes = kTileColumns * 2;
constexpr int kGroupScaleBytes = kTileRows * 2;
constexpr int kMaxGroupsPerTile = 2;
constexpr int kMaxStages = 16;
constexpr int kBarrierBytes = kMaxStages * 2 * 8;

__host__ __device__ constexpr int weight_bytes(int block_tiles, int k_warps, int bits) {
  return block_tiles * k_warps * (kTileRows * kTileColumns / 8) * bits;
}
__host__ __device__ constexpr int scale_bytes(int block_tiles, int k_warps) {
  return block_tiles * k_warps * kMaxGroupsPerTile * kGroupScaleBytes;
}

namespace {

// ---- copies into a ring: before sm_90 of 16 bytes, from then on bulk copies ----

// What completes a stage: from sm_90 on the bytes that one arrival announces, before that each
// lane.
#if __CUDA_ARCH__ >= 900
constexpr int kFullArrivals = 1;
#else
constexpr int kFullArrivals = kWarpSize;
#endif

__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes, int lane) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0) arrive_expecting(barrier, bytes);
  __syncwarp();
#endif
}
// One warp copies `count` runs of `bytes` each, apart by the strides. A bulk copy takes its lane
// some 40 cycles: few long runs.
__device__ __forceinline__ void copy_runs(uint32_t barrier, uint32_t target, int target_stride,
                                          const void* source, int64_t source_stride, int bytes,
                                          int count, int lane) {
  const char* from = static_cast<const char*>(source);
#if __CUDA_ARCH__ >= 900
  if (lane < count) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(target + lane * target_stride),
        "l"(from + lane * source_stride), "r"(bytes), "r"(barrier)
        : "memory");
  }
#else
  for (int i = 0; i < count; ++i) {
    for (int at = lane * kChunkBytes; at < bytes; at += kWarpSize * kChunkBytes) {
      copy_chunk(target + i * target_stride + at, from + i * source_stride + at, true);
    }
  }
#endif
}
// After the last copy of a stage.
__device__ __forceinline__ void finish_copies(uint32_t barrier) {
#if __CUDA_ARCH__ < 900
  arrive_when_copied(barrier);
#endif
}

// The blocks of a cluster meet, and what each wrote before is visible to all.
__device__ __forceinline__ void meet_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The same variable in the shared memory of another block of the cluster.
template <typename V>
__device__ __forceinline__ const V* in_block(const V* pointer, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
  return reinterpret_cast<const V*>(mapped);
#else
  return pointer;
#endif
}

// Ordinary loads, so that the compiler orders them by their use.
template <typename V>
__device__ __forceinline__ V load(const uint8_t* address) {
  return *reinterpret_cast<const V*>(address);
}
// ldmatrix.x4 that ordinary loads may pass.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
// Keeps an address computed once: the compiler would rather compute it anew in each round.
__device__ __forceinline__ uint32_t once(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- codes to exact levels: two numbers of T in 32 bits ----

// (bits & mask) | base in one instruction.
__device__ __forceinline__ uint32_t mask_or(uint32_t bits, uint32_t mask, uint32_t base) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(bits), "r"(mask), "r"(base));
  return result;
}

// Numbers whose last places count 1: a code OR-ed into `base` is added to it.
template <typename T>
struct Magic;
template <>
struct Magic<__half> {
  static constexpr float kBase = 1024.0f;
  static constexpr uint32_t kBits = 0x64006400u;
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
};
template <>
struct Magic<__nv_bfloat16> {
  static constexpr float kBase = 128.0f;
  static constexpr uint32_t kBits = 0x43004300u;
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
};

// Decodes one lane's codes of a tile into A operands: `load` reads those of 64 columns, the lane's
// first chunk given, and a call takes 32 of these columns apart, two products. Two bits come out as
// twice their level, 2 code - zero, so that they are whole numbers.
template <typename T, int kBits>
struct Decoder;

template <typename T>
struct Decoder<T, 2> {
  static constexpr float kScale = 0.5f;
  using Codes = uint2;
  uint32_t terms[3];
  __device__ __forceinline__ explicit Decoder(int zero) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const float term = -Magic<T>::kBase * factor(i) - static_cast<float>(zero);
      terms[i] = Pair<T>::pack(term, term);
    }
  }
  static constexpr __device__ float factor(int place) {
    return place == 0 ? 1.0f : place == 1 ? 0.25f : 0.0625f;
  }
  static __device__ __forceinline__ Codes load(const uint8_t* codes, int half) {
    return cuda::load<uint2>(codes + half * 8);
  }
  // Three codes of each half word can stand in the last places at once; a third fourth by shifting.
  __device__ __forceinline__ void operator()(const Codes& codes, int block,
                                             uint32_t (&a)[2][4]) const {
    const uint32_t words[2] = {codes.x, codes.y};
#pragma unroll
    for (int row_half = 0; row_half < 2; ++row_half) {
      const uint32_t word = words[row_half];
      const uint32_t shifted[3] = {word << 1, word >> 5, word >> 11};
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int i = 4 * block + pair, place = i % 3;
        const uint32_t code = mask_or(shifted[i / 3], 0x00060006u << (2 * place), Magic<T>::kBits);
        a[pair / 2][pair % 2 * 2 + row_half] =
            Magic<T>::fma(code, Pair<T>::pack(factor(place), factor(place)), terms[place]);
      }
    }
  }
};

template <typename T>
struct Decoder<T, 4> {
  static constexpr float kScale = 1.0f;
  using Codes = uint4;
  uint32_t one, term;
  __device__ __forceinline__ explicit Decoder(int) {
    one = Pair<T>::pack(1.0f, 1.0f);
    term = Pair<T>::pack(-Magic<T>::kBase - 8.0f, -Magic<T>::kBase - 8.0f);
  }
  static __device__ __forceinline__ Codes load(const uint8_t* codes, int half) {
    return cuda::load<uint4>(codes + half * kWarpSize * 16);
  }
  __device__ __forceinline__ void operator()(const Codes& codes, int block,
                                             uint32_t (&a)[2][4]) const {
    const uint32_t words[2] = {block ? codes.z : codes.x, block ? codes.w : codes.y};
#pragma unroll
    for (int row_half = 0; row_half < 2; ++row_half) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const uint32_t code = mask_or(words[row_half] >> (4 * pair), 0x000f000fu, Magic<T>::kBits);
        a[pair / 2][pair % 2 * 2 + row_half] = Magic<T>::fma(code, one, term);
      }
    }
  }
};

template <typename T>
struct Decoder<T, 8> {
  static constexpr float kScale = 1.0f;
  struct Codes {
    uint4 blocks[2];
  };
  __device__ __forceinline__ explicit Decoder(int) {}
  // A byte in the last place of 2^23 is added to it.
  static __device__ __forceinline__ float level(uint32_t word, int byte) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + byte)) - (8388608.0f + 128.0f);
  }
  static __device__ __forceinline__ Codes load(const uint8_t* codes, int half) {
    return {cuda::load<uint4>(codes + 2 * half * kWarpSize * 16),
            cuda::load<uint4>(codes + (2 * half + 1) * kWarpSize * 16)};
  }
  __device__ __forceinline__ void operator()(const Codes& codes, int block,
                                             uint32_t (&a)[2][4]) const {
    const uint4 chunk = codes.blocks[block];
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row_half = i / 4, pair = i % 4;
      const uint32_t word = words[2 * row_half + pair / 2];
      a[pair / 2][pair % 2 * 2 + row_half] =
          Pair<T>::pack(level(word, pair % 2 * 2), level(word, pair % 2 * 2 + 1));
    }
  }
};

// kTokenTiles tiles of 8 tokens; kRowWarps x kKWarps warps, each with kRowTiles tiles of 16 rows.
template <typename T, int kBits, int kTokenTiles, int kRowWarps, int kRowTiles, int kKWarps>
struct Linear {
  static constexpr int kWarps = kRowWarps * kKWarps;
  static constexpr int kConsumers = kWarps * kWarpSize;
  static constexpr int kThreads = kConsumers + kWarpSize;
  // Blocks that share a multiprocessor. Before sm_90 the copies' addresses take too many registers,
  // as do 8 bits while they are decoded.
#if __CUDA_ARCH__ >= 900
  static constexpr int kBlocks = kTokenTiles <= 2 && !(kBits == 8 && kKWarps == 16) ? 2 : 1;
#else
  static constexpr int kBlocks = 1;
#endif
  static constexpr int kBlockTiles = kRowWarps * kRowTiles;
  static constexpr int kTileBytes = kTileRows * kTileColumns / 8 * kBits;
  static constexpr int kWeightBytes = weight_bytes(kBlockTiles, kKWarps, kBits);
  static constexpr int kScaleBytes = scale_bytes(kBlockTiles, kKWarps);
  static constexpr int kFragments = kRowTiles * kTokenTiles;
  static constexpr int kFragmentBytes = kWarpSize * 16;
  static constexpr int kWarpSumBytes = kFragments * kFragmentBytes;
  // Of the two scales, rows `row` and `row` + 8, of a row warp's first tile in a stage.
  static __device__ __forceinline__ int scale_offset(int row_warp, int group, int row) {
    return kWeightBytes + row * 4 +
           (row_warp * kRowTiles * kKWarps * kMaxGroupsPerTile + group) * kGroupScaleBytes;
  }
  static constexpr int kSumBytes = (kKWarps > 1 ? kKWarps - 1 : 1) * kRowWarps * kWarpSumBytes;
};

template <typename T, int kBits, int kTokenTiles, int kRowWarps, int kRowTiles, int kKWarps>
__global__ void __launch_bounds__(
    Linear<T, kBits, kTokenTiles, kRowWarps, kRowTiles, kKWarps>::kThreads,
    Linear<T, kBits, kTokenTiles, kRowWarps, kRowTiles, kKWarps>::kBlocks)
    low_bit_linear_kernel(const LinearKernelParams params) {
  using C = Linear<T, kBits, kTokenTiles, kRowWarps, kRowTiles, kKWarps>;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const uint32_t sums = base + kBarrierBytes;
  const uint32_t stages = sums + C::kSumBytes;
  const int tokens = params.num_tokens;
  const int x_tile_bytes = tokens * kXRowBytes;
  const int stage_bytes = C::kWeightBytes + C::kScaleBytes + kKWarps * x_tile_bytes;
  const auto full = [=](int slot) { return base + slot * 16; };
  const auto empty = [=](int slot) { return base + slot * 16 + 8; };

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int ranks = cluster_size();
  const int rank = cluster_rank();
  const int row_tiles = (params.out_features + kTileRows - 1) / kTileRows;
  const int k_tiles = params.in_features / kTileColumns;
  const int first_k = k_tiles * rank / ranks;
  const int last_k = k_tiles * (rank + 1) / ranks;
  const int steps = (last_k - first_k + kKWarps - 1) / kKWarps;  // stages a block of rows takes
  const int blocks = (row_tiles + C::kBlockTiles - 1) / C::kBlockTiles;
  const int first_block = blockIdx.x / ranks;
  const int stride = gridDim.x / ranks;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < params.num_stages; ++slot) {
      init_barrier(full(slot), kFullArrivals);
      init_barrier(empty(slot), C::kWarps);
    }
    publish_barriers();
  }
  allow_next_launch();
  __syncthreads();

  if (warp == C::kWarps) {
    const int groups = params.in_features / params.group;
    const int total = (blocks - first_block + stride - 1) / stride * steps;
    const auto k_tiles_of = [&](int step) {
      return min(kKWarps, last_k - first_k - step * kKWarps);
    };
    const auto copy_weights = [&](int slot, int block, int step) {
      const int k_tile = first_k + step * kKWarps;
      const int count = k_tiles_of(step);
      const int tile = block * C::kBlockTiles;
      const int tiles = min(C::kBlockTiles, row_tiles - tile);
      const int first_group = k_tile * kTileColumns / params.group;
      const int last_group = ((k_tile + count) * kTileColumns - 1) / params.group;
      const int group_bytes = (last_group - first_group + 1) * kGroupScaleBytes;
      const uint32_t stage = stages + slot * stage_bytes;
      expect_bytes(full(slot), tiles * (count * C::kTileBytes + group_bytes) + count * x_tile_bytes,
                   lane);
      copy_runs(full(slot), stage, kKWarps * C::kTileBytes,
                params.qweight + (int64_t{tile} * k_tiles + k_tile) * C::kTileBytes,
                int64_t{k_tiles} * C::kTileBytes, count * C::kTileBytes, tiles, lane);
      copy_runs(full(slot), stage + C::kWeightBytes, kKWarps * kMaxGroupsPerTile * kGroupScaleBytes,
                params.scales + (int64_t{tile} * groups + first_group) * kTileRows,
                int64_t{groups} * kGroupScaleBytes, group_bytes, tiles, lane);
    };
    const auto copy_x = [&](int slot, int step) {
      const int k_tile = first_k + step * kKWarps;
      copy_runs(full(slot), stages + slot * stage_bytes + C::kWeightBytes + C::kScaleBytes, 0,
                static_cast<const char*>(params.x) + int64_t{k_tile} * x_tile_bytes, 0,
                k_tiles_of(step) * x_tile_bytes, 1, lane);
      finish_copies(full(slot));
    };
    // No earlier launch writes weights: as many as there is room for come before its end.
    const int ahead = min(total, params.num_stages);
    int block = first_block;
    int step = 0;
    for (int i = 0; i < ahead; ++i) {
      copy_weights(i, block, step);
      if (++step == steps) step = 0, block += stride;
    }
    wait_for_previous_launch();
    for (int i = 0; i < ahead; ++i) copy_x(i, i % steps);
    int slot = 0;
    uint32_t parity = 0;
    for (int i = ahead; i < total; ++i) {
      wait_phase(empty(slot), parity);
      copy_weights(slot, block, step);
      copy_x(slot, step);
      if (++step == steps) step = 0, block += stride;
      if (++slot == params.num_stages) slot = 0, parity ^= 1;
    }
  } else {
    const int row_warp = warp / kKWarps;
    const int k_warp = warp % kKWarps;
    const int g = lane / 4;
    const Decoder<T, kBits> decode(params.zero);
    // Where this lane reads in a stage.
    const uint32_t codes_at =
        once((row_warp * kRowTiles * kKWarps + k_warp) * C::kTileBytes + lane * 16);
    const int column = k_warp * kTileColumns;
    const uint32_t scales_at[2] = {
        once(C::scale_offset(row_warp, column >> params.group_shift, g)),
        once(C::scale_offset(row_warp, (column + kTileColumns / 2) >> params.group_shift, g))};
    // Lanes of eight bring the rows of one 8x8 matrix, the four of them 32 columns.
    const uint32_t x_at = once(C::kWeightBytes + C::kScaleBytes + k_warp * x_tile_bytes);
    const int x_row = lane % 8;
    const int x_chunk = lane / 8;
    // Token tiles multiplied in turn, so that no product waits for the one before it.
    constexpr int kSideBySide = kTokenTiles > 1 ? 2 : 1;
    constexpr int kUnrolledHalves = kTokenTiles == 1 && kRowTiles > 1 ? 2 : 1;
    constexpr int kChains = kSideBySide * kRowTiles == 1 ? 2 : 1;
    const uint8_t* const ring = shared + (stages - base);
    int slot = 0;
    uint32_t parity = 0;
    for (int block = first_block; block < blocks; block += stride) {
      float acc[kRowTiles][kTokenTiles][4] = {};
      for (int step = 0; step < steps; ++step) {
        const uint8_t* stage = ring + slot * stage_bytes;
        const uint32_t slot_address = stages + slot * stage_bytes;
        wait_phase(full(slot), parity);
        if (first_k + step * kKWarps + k_warp < last_k) {
#pragma unroll(kUnrolledHalves)
          for (int half = 0; half < 2; ++half) {
            uint32_t a[kRowTiles][2][2][4];  // by block of 32 columns and product
            float2 scale[kRowTiles];
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) {
              const auto codes = decode.load(stage + codes_at + r * kKWarps * C::kTileBytes, half);
              decode(codes, 0, a[r][0]);
              decode(codes, 1, a[r][1]);
              const uint8_t* pair = stage + (half ? scales_at[1] : scales_at[0]) +
                                    r * kKWarps * kMaxGroupsPerTile * kGroupScaleBytes;
              scale[r] = Pair<__nv_bfloat16>::unpack(load<uint32_t>(pair));
            }
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; tile += kSideBySide) {
              if (kTokenTiles > 2) {
                if (tile * 8 >= tokens) break;
                asm volatile("" ::: "memory");  // x of one round at a time: registers are short
              }
              uint32_t b[kSideBySide][2][4];
#pragma unroll
              for (int i = 0; i < kSideBySide; ++i) {
                // Operand columns beyond the last token repeat it; what they yield is not stored.
                const int row = min((tile + i) * 8 + x_row, tokens - 1);
                const uint32_t x = slot_address + x_at + row * kXRowBytes + half * kTileColumns;
                const int chunk = (x_chunk ^ row % 8) * kChunkBytes;
                load_matrices(b[i][0], x + chunk);
                load_matrices(b[i][1], x + (chunk ^ 4 * kChunkBytes));
              }
              float sum[kChains][kRowTiles][kSideBySide][4] = {};
#pragma unroll
              for (int k = 0; k < 4; ++k) {
#pragma unroll
                for (int i = 0; i < kSideBySide; ++i) {
#pragma unroll
                  for (int r = 0; r < kRowTiles; ++r) {
                    mma_16x8x16<T>(sum[k % kChains][r][i], a[r][k / 2][k % 2],
                                   b[i][k / 2][k % 2 * 2], b[i][k / 2][k % 2 * 2 + 1]);
                  }
                }
              }
#pragma unroll
              for (int i = 0; i < kSideBySide; ++i) {
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
                  for (int n = 0; n < 4; ++n) {
                    const float group_sum = kChains == 2
                                                ? sum[0][r][i][n] + sum[kChains - 1][r][i][n]
                                                : sum[0][r][i][n];
                    acc[r][tile + i][n] += group_sum * (n < 2 ? scale[r].x : scale[r].y);
                  }
                }
              }
            }
          }
        }
        __syncwarp();
        if (lane == 0) arrive(empty(slot));
        if (++slot == params.num_stages) slot = 0, parity ^= 1;
      }

      // Read anew, so that nothing of it takes a register through the loop above.
      int thread;
      asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
      const int lane = thread % kWarpSize;
      const int row_warp = thread / kWarpSize / kKWarps;
      const int k_warp = thread / kWarpSize % kKWarps;
      const int g = lane / 4;
      const int t = lane % 4;

      // The warps that split the columns hand their sums to the first of them.
      const auto sum_address = [&](int k, int fragment) {
        return sums + ((k - 1) * kRowWarps + row_warp) * C::kWarpSumBytes +
               fragment * C::kFragmentBytes + lane * 16;
      };
      const auto for_fragments = [&](auto body) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) body(r * kTokenTiles + tile, acc[r][tile]);
        }
      };
      const auto put = [](uint32_t address, const float (&sum)[4]) {
        asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(sum[0]),
                     "f"(sum[1]), "f"(sum[2]), "f"(sum[3])
                     : "memory");
      };
      constexpr int kSumsReady = 1;
      constexpr int kSumsRead = 2;
      if (kKWarps > 1) {
        if (k_warp > 0) {
          if (block != first_block) sync_named(kSumsRead, C::kConsumers);
          for_fragments([&](int f, const float (&sum)[4]) { put(sum_address(k_warp, f), sum); });
        }
        sync_named(kSumsReady, C::kConsumers);
      }
      const auto store = [&](int f, const float (&sum)[4]) {
        T* out = static_cast<T*>(params.out);
        const int row =
            (block * C::kBlockTiles + row_warp * kRowTiles + f / kTokenTiles) * kTileRows + g;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = f % kTokenTiles * 8 + 2 * t + i % 2;
          const int n = row + i / 2 * 8;
          if (token < tokens && n < params.out_features) {
            out[int64_t{token} * params.out_features + n] =
                static_cast<T>(sum[i] * Decoder<T, kBits>::kScale);
          }
        }
      };
      if (k_warp == 0) {
        for_fragments([&](int f, float (&sum)[4]) {
#pragma unroll
          for (int k = 1; k < kKWarps; ++k) {
            const float4 part = load<float4>(shared + (sum_address(k, f) - base));
            sum[0] += part.x;
            sum[1] += part.y;
            sum[2] += part.z;
            sum[3] += part.w;
          }
          if (ranks == 1) {
            store(f, sum);
          } else {
            put(sum_address(1, f), sum);
          }
        });
        if (kKWarps > 1 && block + stride < blocks) arrive_named(kSumsRead, C::kConsumers);
      }
      // A cluster works on one block of rows; each rank adds up its share of the fragments.
      if (ranks > 1) {
        meet_cluster();
        if (k_warp == 0) {
          for_fragments([&](int f, float (&sum)[4]) {
            if (f % ranks != rank) return;
            const float4* own = reinterpret_cast<const float4*>(shared + sum_address(1, f) - base);
            float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
            for (int other = 0; other < ranks; ++other) {
              const float4 part = *in_block(own, other);
              total.x += part.x;
              total.y += part.y;
              total.z += part.z;
              total.w += part.w;
            }
            sum[0] = total.x, sum[1] = total.y, sum[2] = total.z, sum[3] = total.w;
            store(f, sum);
          });
        }
        meet_cluster();
      }
    }
    return;
  }
  if (ranks > 1) {
    for (int i = 0; i < 2; ++i) {
      meet_cluster();
    }
  }
}

template <typename T, int kBits, int kTokenTiles, int kRowWarps, int kRowTiles, int kKWarps>
LinearKernel describe() {
  using C = Linear<T, kBits, kTokenTiles, kRowWarps, kRowTiles, kKWarps>;
  return {low_bit_linear_kernel<T, kBits, kTokenTiles, kRowWarps, kRowTiles, kKWarps>,
          kTokenTiles * 8,
          C::kBlockTiles,
          kKWarps,
          C::kThreads,
          C::kSumBytes};
}

template <typename T, int kBits>
LinearKernel kernel_for(int num_tokens, bool has_many_rows) {
  if (num_tokens > 16) {
    // Eight bits need more registers while they are decoded.
    constexpr bool kIsWide = kBits == 8;
    return describe<T, kBits, 8, kIsWide ? 6 : 4, kIsWide ? 1 : 2, 2>();
  }
  if (num_tokens > 8) return describe<T, kBits, 2, 2, 2, 4>();
  return has_many_rows ? describe<T, kBits, 1, 1, 2, 8>() : describe<T, kBits, 1, 1, 1, 16>();
}

template <int kBits>
LinearKernel kernel_for(int32_t dtype, int num_tokens, bool has_many_rows) {
  return dtype == kFloat16 ? kernel_for<__half, kBits>(num_tokens, has_many_rows)
                           : kernel_for<__nv_bfloat16, kBits>(num_tokens, has_many_rows);
}

}  // namespace
}  // namespace cuda
}  // namespace minicpm41
