// The host's side of low_bit_linear: which kernel, how many blocks, how deep a ring; and the
// Hadamard transform of x, which goes first where a weight wants it.
#include "low_bit_linear_even_shares.cuh"
#include "low_bit_linear_one_token.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr char kOp[] = "low_bit_linear";
constexpr int kArrangeThreads = 128;
constexpr int kNumbersPerLane = 4;
constexpr int kBulkAlignment = 16;
constexpr int kFewTokens = 8;  // one tile of operand columns

// x in the order in which a stage takes it (LinearKernelParams), or row by row; or x H, in fp32 and
// rounded once: four neighbours a lane, 16 or 32 lanes a block of H.
template <typename T>
__global__ void __launch_bounds__(kArrangeThreads)
    arrange_kernel(const T* x, T* out, int num_tokens, int in_features, int hadamard, bool by_row) {
  allow_next_launch();
  wait_for_previous_launch();
  const int column = (blockIdx.x * kArrangeThreads + threadIdx.x) * kNumbersPerLane;
  const int token = blockIdx.y;
  if (column >= in_features) return;  // whole warps: a warp has one tile's columns
  uint2 pairs = *reinterpret_cast<const uint2*>(x + int64_t{token} * in_features + column);
  if (hadamard > 0) {
    const float2 low = Pair<T>::unpack(pairs.x);
    const float2 high = Pair<T>::unpack(pairs.y);
    const float a = low.x + low.y, b = low.x - low.y, c = high.x + high.y, d = high.x - high.y;
    float v[kNumbersPerLane] = {a + c, b + d, a - c, b - d};
    for (int step = 1; step < hadamard / kNumbersPerLane; step *= 2) {
#pragma unroll
      for (int i = 0; i < kNumbersPerLane; ++i) {
        const float other = __shfl_xor_sync(kAllLanes, v[i], step);
        v[i] = threadIdx.x & step ? other - v[i] : v[i] + other;
      }
    }
    const float norm = rsqrtf(static_cast<float>(hadamard));
    pairs.x = Pair<T>::pack(v[0] * norm, v[1] * norm);
    pairs.y = Pair<T>::pack(v[2] * norm, v[3] * norm);
  }
  constexpr int kChunk = kChunkBytes / sizeof(T);
  const int64_t row = int64_t{column / kTileColumns} * num_tokens + token;
  const int swapped = column % kTileColumns ^ token % 8 * kChunk;
  const int64_t at = by_row ? int64_t{token} * in_features + column : row * kTileColumns + swapped;
  *reinterpret_cast<uint2*>(out + at) = pairs;
}

template <typename T>
cudaError_t launch_arrange(const LowBitLinearParams& params, int first, int num_tokens, bool by_row,
                           bool overlap, void* stream) {
  const int in_features = params.weight.in_features;
  constexpr int kNumbers = kArrangeThreads * kNumbersPerLane;
  LaunchShape shape;
  shape.grid = dim3((in_features + kNumbers - 1) / kNumbers, num_tokens);
  shape.threads = kArrangeThreads;
  shape.overlap = overlap;
  return launch(arrange_kernel<T>, shape, stream,
                static_cast<const T*>(params.x) + int64_t{first} * in_features,
                static_cast<T*>(params.workspace), num_tokens, in_features,
                int{params.weight.hadamard}, bool{by_row});
}

// What one launch takes: as many tokens as leave room for two stages, more stages where they fit.
struct Plan {
  LinearKernel kernel;
  int tokens;
  int stages;
  int shared_bytes;
  bool is_long;
};

// Columns to groups; a whole row is one.
int group_shift(const LowBitWeight& weight) {
  return weight.group == 64 ? 6 : weight.group == 128 ? 7 : 31;
}

// One token is read where it lies.
bool is_arranged(const LowBitWeight& weight, int num_tokens) {
  return num_tokens > 1 || weight.hadamard > 0;
}

// Whether a ring of at least two stages fits for these tokens.
bool plan_ring(const LinearKernel& kernel, int tokens, int bits, const Device& device, Plan* plan) {
  // Half of a multiprocessor, so that the next launch's blocks can copy while these work; less
  // where two blocks work side by side for long.
  constexpr int kHalf = 113 * 1024, kQuarter = 56 * 1024;
  const bool is_small = tokens <= kFewTokens;
  const int wanted = std::min(plan->is_long && is_small ? kQuarter : kHalf, device.shared_bytes);
  const int few_stages = is_small ? 4 : 3;
  const int stage = weight_bytes(kernel.block_tiles, kernel.k_warps, bits) +
                    scale_bytes(kernel.block_tiles, kernel.k_warps) +
                    tokens * kernel.k_warps * kXRowBytes;
  const int fixed = kBarrierBytes + kernel.sum_bytes;
  int stages = (wanted - fixed) / stage;
  if (stages < few_stages) stages = std::min(few_stages, (device.shared_bytes - fixed) / stage);
  plan->kernel = kernel;
  plan->tokens = tokens;
  plan->stages = std::min(stages, kMaxStages);
  plan->shared_bytes = fixed + plan->stages * stage;
  return plan->stages >= 2;
}

// Each multiprocessor gets several blocks, however many rows a warp takes.
bool has_many_rows(const LowBitWeight& weight, const Device& device) {
  return tile_rows(weight) >= 8 * device.multiprocessors;
}

bool plan_launch(const LowBitLinearParams& params, const Device& device, Plan* plan) {
  const LowBitWeight& weight = params.weight;
  // A row of tiles is a stage for each 16 tiles of it.
  constexpr int kStageTiles = 16, kManyStages = 8;
  const int64_t stages = int64_t{tile_rows(weight)} * tile_columns(weight) / kStageTiles;
  plan->is_long = stages > int64_t{kManyStages} * device.multiprocessors;
  const bool many_rows = has_many_rows(weight, device);
  const auto kernel_of = weight.bits == 2   ? w2_linear_kernel
                         : weight.bits == 4 ? w4_linear_kernel
                                            : w8_linear_kernel;
  for (int tokens = params.num_tokens; tokens > 0; tokens = tokens > 1 ? (tokens + 1) / 2 : 0) {
    // The kernel for the most tokens has the smallest stages: it serves where little memory is.
    for (const int for_tokens : {tokens, kMaxDecodeTokens}) {
      const LinearKernel kernel = kernel_of(params.dtype, for_tokens, many_rows);
      if (plan_ring(kernel, tokens, weight.bits, device, plan)) return true;
    }
  }
  return false;
}

cudaError_t launch_linear(const LowBitLinearParams& params, int first, const Plan& plan,
                          const Device& device, void* stream) {
  const LowBitWeight& weight = params.weight;
  const LinearKernel& kernel = plan.kernel;
  constexpr int64_t kBytes = 2;  // of a number of x and out
  const int num_tokens = std::min(plan.tokens, params.num_tokens - first);
  LinearKernelParams launch_params{};
  launch_params.x = static_cast<const char*>(params.x) + first * kBytes * weight.in_features;
  cudaError_t error = cudaSuccess;
  if (is_arranged(weight, num_tokens)) {
    launch_params.x = params.workspace;
    const auto arrange =
        params.dtype == kFloat16 ? launch_arrange<__half> : launch_arrange<__nv_bfloat16>;
    error = arrange(params, first, num_tokens, false, device.has_clusters(), stream);
  }
  int resident = 0;
  if (error == cudaSuccess) {
    error = count_clusters(kernel.kernel, kernel.threads, plan.shared_bytes, 1, &resident);
  }
  if (error != cudaSuccess) return error;
  const int blocks = (tile_rows(weight) + kernel.block_tiles - 1) / kernel.block_tiles;
  // Columns are split where that gives idle multiprocessors work, and no further than a
  // stage each.
  int ranks = 1;
  if (device.has_clusters()) {
    constexpr int kMostRanks = 8;
    const int most = std::min(kMostRanks, tile_columns(weight) / kernel.k_warps);
    const int room = std::min(resident, device.multiprocessors * 9 / 8);
    for (int wanted = std::min(most, room / blocks); wanted > 1; --wanted) {
      int clusters = 0;
      error = count_clusters(kernel.kernel, kernel.threads, plan.shared_bytes, wanted, &clusters);
      if (error != cudaSuccess) return error;
      if (clusters < blocks) continue;
      ranks = wanted;
      break;
    }
  }
  launch_params.qweight = weight.qweight;
  launch_params.scales = weight.scales;
  launch_params.out = static_cast<char*>(params.out) + first * kBytes * weight.out_features;
  launch_params.num_tokens = num_tokens;
  launch_params.out_features = weight.out_features;
  launch_params.in_features = weight.in_features;
  launch_params.group = weight.group;
  launch_params.group_shift = group_shift(weight);
  launch_params.zero = weight.zero;
  launch_params.num_stages = plan.stages;
  LaunchShape shape;
  // One block a multiprocessor works through several rows, so that the next launch's first block
  // has room beside it. As many as there is room for where there is much to do, or where one each
  // would leave most without work at the end.
  const int left_over = blocks % device.multiprocessors;
  const bool is_uneven = left_over > 0 && left_over < device.multiprocessors / 2;
  const int most_blocks =
      plan.is_long || is_uneven ? resident : std::min(resident, device.multiprocessors);
  shape.grid = dim3(ranks > 1 ? blocks * ranks : std::min(blocks, std::max(1, most_blocks)));
  shape.threads = kernel.threads;
  shape.shared_bytes = plan.shared_bytes;
  shape.cluster = ranks;
  shape.overlap = device.has_clusters();
  return launch(kernel.kernel, shape, stream, launch_params);
}

// ---- Hopper ----

constexpr int kStaticBytes = 4 * 1024;  // at most, of shared memory: barriers and sums
constexpr int kHalfBytes = 110 * 1024;  // of a multiprocessor's: two blocks find room
// Blocks that ask for more have a multiprocessor each. Launches of such blocks do not overlap, but
// neither do two blocks of the next launch settle on one multiprocessor while others idle.
constexpr int kMoreThanHalf = 120 * 1024;

// Of one tile of columns.
int scale_groups(const LowBitWeight& weight) { return weight.group == 64 ? 2 : 1; }

// x as the kernels of sm_90a read it, row by row, its Hadamard transform taken where there is one.
cudaError_t find_x(const LowBitLinearParams& params, void* stream, const void** x) {
  *x = params.x;
  if (params.weight.hadamard == 0) return cudaSuccess;
  *x = params.workspace;
  const auto arrange =
      params.dtype == kFloat16 ? launch_arrange<__half> : launch_arrange<__nv_bfloat16>;
  return arrange(params, 0, params.num_tokens, true, true, stream);
}

// A map of x in boxes of `tiles` tiles of columns by `tokens`.
Status encode_x(const LowBitLinearParams& params, const void* x, int tiles, int tokens,
                CUtensorMap* map) {
  // Rows of 64 numbers, the most that a swizzle takes: the second half is a third dimension.
  constexpr cuuint32_t kHalf = kTileColumns / 2;
  constexpr cuuint64_t kBytes = 2;
  const cuuint64_t columns = params.weight.in_features;
  return encode_map(
      kOp,
      params.dtype == kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      x, {kHalf, cuuint64_t(params.num_tokens), columns / kHalf},
      {kBytes * columns, kBytes * kHalf}, {kHalf, cuuint32_t(tokens), 2 * cuuint32_t(tiles)},
      CU_TENSOR_MAP_SWIZZLE_128B, map);
}

// A map of scales in boxes of `tiles` tiles by `box_groups` groups.
Status encode_scales(const LowBitWeight& weight, int tiles, int box_groups, CUtensorMap* map) {
  constexpr cuuint32_t kPairs = kTileRows / 2;
  const cuuint64_t groups = weight.in_features / weight.group;
  const cuuint64_t rows = tile_rows(weight);
  return encode_map(kOp, CU_TENSOR_MAP_DATA_TYPE_UINT32, weight.scales, {groups * kPairs, rows},
                    {groups * kGroupScaleBytes}, {kPairs * box_groups, cuuint32_t(tiles)},
                    CU_TENSOR_MAP_SWIZZLE_NONE, map);
}

// Whether the kernel for one token serves this weight, and its launch but for x. With many rows
// codes of 4 bits come from memory no faster than they are taken apart for it.
bool plan_one_token(const LowBitLinearParams& params, const Device& device, OneTokenLinear* kernel,
                    OneTokenParams* launch_params, LaunchShape* shape) {
  // Of a multiprocessor's shared memory, by a block: two find room, and never three.
  constexpr int kBlockBytes = 109 * 1024, kLeastBytes = 78 * 1024;
  // A deeper ring of the next launch takes more of the bandwidth that this one still needs.
  constexpr int kTwoBitRing = 56 * 1024, kLateRing = 72 * 1024;
  const LowBitWeight& weight = params.weight;
  if (device.major != 9 || params.num_tokens != 1 || weight.bits == 8) return false;
  if (weight.bits == 4 && has_many_rows(weight, device)) return false;
  const int tiles = tile_rows(weight), k_tiles = tile_columns(weight);
  const int blocks = std::min(tiles, device.multiprocessors);
  const int share = (tiles + blocks - 1) / blocks;
  *kernel = weight.bits == 2 ? w2_linear_one_token(params.dtype, share)
                             : w4_linear_one_token(params.dtype, share);
  if (!kernel->is_built) return false;
  // A block that works on all its rows at once needs each column once.
  const int parts =
      share <= kernel->row_tiles ? 1 : (k_tiles + kernel->part_tiles - 1) / kernel->part_tiles;
  const int x_bytes = parts * kernel->part_bytes;
  // A block that works on all its rows at once, through more than a ring holds: the next launch
  // begins when a stage is free, and then copies a deeper ring.
  const bool begins_late = weight.bits == 2 && share <= kernel->row_tiles &&
                           k_tiles * tile_bytes(weight) * share > kLateRing;
  const int most = weight.bits == 4 ? kBlockBytes : begins_late ? kLateRing : kTwoBitRing;
  const int room = std::min(kBlockBytes - x_bytes, most);
  const int stages = std::min(room / kernel->stage_bytes, kMaxStages);
  if (stages < 2) return false;
  launch_params->qweight = weight.qweight;
  launch_params->scales = weight.scales;
  launch_params->out = params.out;
  launch_params->out_features = weight.out_features;
  launch_params->k_tiles = k_tiles;
  launch_params->groups = weight.in_features / weight.group;
  launch_params->tile_groups = scale_groups(weight);
  launch_params->group_shift = group_shift(weight);
  launch_params->zero = weight.zero;
  launch_params->num_stages = stages;
  launch_params->next_launch_at = begins_late ? stages + 1 : 0;
  launch_params->x_parts = parts;
  shape->grid = dim3(blocks);
  shape->threads = kernel->threads;
  shape->shared_bytes = std::max(kLeastBytes, x_bytes + stages * kernel->stage_bytes);
  shape->overlap = true;
  return true;
}

Status launch_one_token(const LowBitLinearParams& params, const OneTokenLinear& kernel,
                        OneTokenParams launch_params, const LaunchShape& shape, void* stream) {
  int resident = 0;  // not needed; the kernel is readied for this much shared memory
  cudaError_t error = find_x(params, stream, &launch_params.x);
  if (error == cudaSuccess) {
    error = count_clusters(kernel.kernel, kernel.threads, shape.shared_bytes, 1, &resident);
  }
  if (error == cudaSuccess) error = launch(kernel.kernel, shape, stream, launch_params);
  return launch_status(kOp, error);
}

// How a launch with even shares of rows shares its work.
struct EvenSharesPlan {
  EvenSharesLinear kernel;
  LaunchShape shape;
  int stages;
  int sums_at;
};

// Whether the kernel so arranged serves, with its blocks all at once. `two_launches`: a block takes
// half of a multiprocessor, and each multiprocessor gets one of each launch.
bool plan_even_shares(const LowBitLinearParams& params, const Device& device,
                      EvenSharesArrangement how, int ranks, bool two_launches,
                      EvenSharesPlan* plan) {
  // Room for two, and never for three.
  constexpr int kHalf = 225 * 512, kMoreThanThird = 78 * 1024;
  const LowBitWeight& weight = params.weight;
  const EvenSharesLinear kernel = weight.bits == 2
                                      ? w2_linear_even_shares(params.dtype, params.num_tokens, how)
                                      : w4_linear_even_shares(params.dtype, params.num_tokens, how);
  const int rows = tile_rows(weight), k_tiles = tile_columns(weight);
  if (!kernel.is_built || ranks > k_tiles) return false;
  const int most = device.multiprocessors / ranks;
  const int blocks = two_launches ? std::min(rows, most) : (rows + kernel.tiles - 1) / kernel.tiles;
  if (blocks > most || rows > blocks * kernel.tiles) return false;
  const int received =
      ranks > 1 ? (kernel.fragments + ranks - 1) / ranks * (ranks - 1) * kFragmentBytes : 0;
  const int bytes = two_launches ? kHalf : device.shared_bytes - kStaticBytes;
  const int room = bytes - kSwizzleBytes - received;
  const int own_tiles = (k_tiles + ranks - 1) / ranks;
  const int steps = (own_tiles + kernel.k_warps - 1) / kernel.k_warps;
  plan->kernel = kernel;
  plan->stages = std::min({room / kernel.stage_bytes, kMaxStages, steps});
  // A ring that turns, and half as deep, loses more than two launches win, by measurement.
  if (two_launches && plan->stages < steps) return false;
  if (plan->stages < std::min(2, steps)) return false;
  const int ring = plan->stages * kernel.stage_bytes;
  const bool is_apart = ring + kernel.sum_bytes <= room;
  if (!is_apart && kernel.sum_bytes > ring) return false;
  plan->sums_at = is_apart ? ring + received : 0;
  LaunchShape& shape = plan->shape;
  shape.grid = dim3(blocks * ranks);
  shape.threads = kernel.threads;
  shape.shared_bytes = std::max(bytes - room + ring + (is_apart ? kernel.sum_bytes : 0),
                                two_launches ? kMoreThanThird : kMoreThanHalf);
  shape.cluster = ranks;
  shape.overlap = true;
  int clusters = 0;
  const cudaError_t error =
      count_clusters(kernel.kernel, kernel.threads, shape.shared_bytes, ranks, &clusters);
  return error == cudaSuccess && clusters >= blocks;
}

// By measurement on the model's shapes: the other kernels serve the rest as fast or faster.
bool plan_even_shares(const LowBitLinearParams& params, const Device& device,
                      EvenSharesPlan* plan) {
  using How = EvenSharesArrangement;
  const LowBitWeight& weight = params.weight;
  const bool is_more = params.num_tokens > kFewTokens;
  const bool is_few = params.num_tokens > 1 && params.num_tokens <= 2 * kFewTokens;
  if (device.major != 9 || !is_few || weight.bits == 8) return false;
  if (has_many_rows(weight, device)) {
    return weight.bits == 2 && is_more &&
           plan_even_shares(params, device, How::kManyTiles, 1, false, plan);
  }
  return plan_even_shares(params, device, How::kFourTiles, 2, true, plan) ||
         plan_even_shares(params, device, How::kFiveTiles, 2, true, plan);
}

Status launch_even_shares(const LowBitLinearParams& params, const EvenSharesPlan& plan,
                          void* stream) {
  const LowBitWeight& weight = params.weight;
  const EvenSharesLinear& kernel = plan.kernel;
  EvenSharesParams launch_params{};
  launch_params.out = params.out;
  launch_params.num_tokens = params.num_tokens;
  launch_params.out_features = weight.out_features;
  launch_params.k_tiles = tile_columns(weight);
  launch_params.tile_groups = scale_groups(weight);
  launch_params.group_shift = group_shift(weight);
  launch_params.zero = weight.zero;
  launch_params.num_stages = plan.stages;
  launch_params.sums_at = plan.sums_at;
  const void* x = nullptr;
  const cudaError_t error = find_x(params, stream, &x);
  if (error != cudaSuccess) return launch_status(kOp, error);
  Status status = encode_x(params, x, kernel.k_warps, kernel.max_tokens, &launch_params.x);
  if (!status.ok()) return status;
  constexpr cuuint32_t kNumberBytes = 8;
  const cuuint64_t row_bytes = cuuint64_t(tile_bytes(weight)) * tile_columns(weight);
  status = encode_map(kOp, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, weight.qweight,
                      {row_bytes / kNumberBytes, cuuint64_t(tile_rows(weight))}, {row_bytes},
                      {kernel.run_bytes / kNumberBytes, cuuint32_t(kernel.tiles)},
                      CU_TENSOR_MAP_SWIZZLE_NONE, &launch_params.codes);
  if (!status.ok()) return status;
  const int stage_groups =
      weight.group > kTileColumns ? 1 : kernel.k_warps * launch_params.tile_groups;
  status = encode_scales(weight, kernel.tiles, stage_groups, &launch_params.scales);
  if (!status.ok()) return status;
  return launch_status(kOp, launch(kernel.kernel, plan.shape, stream, launch_params));
}

// Whether the kernel for few tokens serves, where its blocks run all at once, and how.
bool plan_few_tokens(const LowBitLinearParams& params, const Device& device,
                     FewTokensLinear* kernel, LaunchShape* shape, int* num_stages) {
  const LowBitWeight& weight = params.weight;
  const bool is_few = params.num_tokens > 1 && params.num_tokens <= 2 * kFewTokens;
  if (device.major != 9 || !is_few || weight.bits == 8) return false;
  *kernel = weight.bits == 2 ? w2_linear_few_tokens(params.dtype, params.num_tokens)
                             : w4_linear_few_tokens(params.dtype, params.num_tokens);
  if (!kernel->is_built) return false;
  const int blocks = (tile_rows(weight) + kernel->tiles - 1) / kernel->tiles;
  const int k_tiles = tile_columns(weight);
  if (blocks > device.multiprocessors) return false;
  const int fixed = kSwizzleBytes + kernel->sum_bytes;
  const int room = (device.shared_bytes - kStaticBytes - fixed) / kernel->stage_bytes;
  shape->threads = kernel->threads;
  shape->overlap = true;
  for (int ranks = std::min(kMostFewTokensRanks, k_tiles); ranks >= 1; --ranks) {
    const int own_tiles = (k_tiles + ranks - 1) / ranks;
    const int steps = (own_tiles + kernel->k_warps - 1) / kernel->k_warps;
    *num_stages = std::min({room, kMaxStages, steps});
    if (room < std::min(2, steps)) return false;
    shape->shared_bytes = std::max(fixed + *num_stages * kernel->stage_bytes, kMoreThanHalf);
    shape->cluster = ranks;
    shape->grid = dim3(blocks * ranks);
    int clusters = 0;
    const cudaError_t error =
        count_clusters(kernel->kernel, kernel->threads, shape->shared_bytes, ranks, &clusters);
    if (error == cudaSuccess && clusters >= blocks) return true;
  }
  return false;
}

Status launch_few_tokens(const LowBitLinearParams& params, const FewTokensLinear& kernel,
                         const LaunchShape& shape, int num_stages, void* stream) {
  const LowBitWeight& weight = params.weight;
  FewTokensParams launch_params{};
  launch_params.out = params.out;
  launch_params.num_tokens = params.num_tokens;
  launch_params.out_features = weight.out_features;
  launch_params.k_tiles = tile_columns(weight);
  launch_params.tile_groups = scale_groups(weight);
  launch_params.group_shift = group_shift(weight);
  launch_params.zero = weight.zero;
  launch_params.num_stages = num_stages;
  const void* x = nullptr;
  const cudaError_t error = find_x(params, stream, &x);
  if (error != cudaSuccess) return launch_status(kOp, error);
  Status status = encode_x(params, x, 1, kernel.max_tokens, &launch_params.x);
  if (!status.ok()) return status;
  constexpr cuuint32_t kNumberBytes = 8;
  const cuuint64_t row_bytes = cuuint64_t(tile_bytes(weight)) * tile_columns(weight);
  status = encode_map(kOp, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, weight.qweight,
                      {row_bytes / kNumberBytes, cuuint64_t(tile_rows(weight))}, {row_bytes},
                      {kBoxBytes / kNumberBytes, cuuint32_t(kernel.tiles)},
                      CU_TENSOR_MAP_SWIZZLE_NONE, &launch_params.codes);
  if (!status.ok()) return status;
  const int stage_groups =
      weight.group > kTileColumns ? 1 : kernel.k_warps * launch_params.tile_groups;
  status = encode_scales(weight, kernel.tiles, stage_groups, &launch_params.scales);
  if (!status.ok()) return status;
  return launch_status(kOp, launch(kernel.kernel, shape, stream, launch_params));
}

// How the kernels for many tokens are launched.
struct HopperPlan {
  LaunchShape shape;
  int num_stages;
  int sums_at;
  int64_t longest;  // tiles that a multiprocessor takes
};

// Into how many ranks the columns are split, and how deep the ring is: a block a multiprocessor
// where its ring then holds a third of its columns at least, else two.
cudaError_t plan_hopper(const HopperLinear& kernel, const LowBitWeight& weight,
                        const Device& device, HopperPlan* result) {
  constexpr int kMostRanks = 8;
  const int blocks = (tile_rows(weight) + kernel.tiles - 1) / kernel.tiles;
  const int steps = (tile_columns(weight) + kernel.k_tiles - 1) / kernel.k_tiles;
  const int stage = kernel.stage_bytes + kernel.scale_bytes;
  const int token_tiles = kernel.max_tokens / 8;
  const bool always_sends = kernel.sum_bytes == 0;
  const auto plan = [&](int bytes, int most_blocks, int least_bytes, bool apart) -> cudaError_t {
    const int most = std::max(1, std::min({kMostRanks, steps, most_blocks / blocks}));
    for (int ranks = most; ranks >= 1; --ranks) {
      const int longest = (steps + ranks - 1) / ranks;
      const bool sends = always_sends || (apart && ranks > 1);
      const int received =
          sends ? (token_tiles + ranks - 1) / ranks * ranks * kernel.fragment_bytes : 0;
      const int beside = kSwizzleBytes + received;
      const int in_ring = sends ? 0 : kernel.sum_bytes;
      const int fewest = std::max(2, (in_ring + kernel.stage_bytes - 1) / kernel.stage_bytes);
      result->num_stages =
          std::max(fewest, std::min({(bytes - beside) / stage, kMaxHopperStages, longest}));
      result->sums_at = sends ? result->num_stages * stage : 0;
      result->longest = int64_t{longest} * kernel.k_tiles * kernel.tiles;
      result->shape.shared_bytes = std::max(beside + result->num_stages * stage, least_bytes);
      result->shape.cluster = ranks;
      result->shape.grid = dim3(blocks * ranks);
      int clusters = 0;
      const cudaError_t error = count_clusters(kernel.kernel, kernel.threads,
                                               result->shape.shared_bytes, ranks, &clusters);
      if (error != cudaSuccess || clusters >= blocks) return error;
    }
    return cudaSuccess;
  };
  result->shape.threads = kernel.threads;
  result->shape.overlap = true;
  cudaError_t error =
      plan(device.shared_bytes - kStaticBytes, device.multiprocessors * 9 / 8, kMoreThanHalf, true);
  const int longest = (steps + result->shape.cluster - 1) / result->shape.cluster;
  const bool is_whole = blocks <= device.multiprocessors && longest <= 3 * result->num_stages;
  if (error != cudaSuccess || is_whole || always_sends) return error;
  error = plan(kHalfBytes, std::max(device.multiprocessors * 17 / 8, blocks), 0, false);
  result->longest *= 2;
  return error;
}

// Whether the kernels for many tokens serve, and which: narrow blocks where a multiprocessor has
// less to do by these.
bool find_hopper(const LowBitLinearParams& params, const Device& device, HopperLinear* kernel,
                 HopperPlan* plan, cudaError_t* error) {
  if (device.major != 9 || params.num_tokens <= 2 * kFewTokens) return false;
  const LowBitWeight& weight = params.weight;
  const auto kernel_of = weight.bits == 2   ? w2_linear_sm90
                         : weight.bits == 4 ? w4_linear_sm90
                                            : w8_linear_sm90;
  *kernel = kernel_of(params.dtype, params.num_tokens, false);
  if (!kernel->is_built) return false;
  *error = plan_hopper(*kernel, weight, device, plan);
  const HopperLinear narrow = kernel_of(params.dtype, params.num_tokens, true);
  if (*error != cudaSuccess || !narrow.is_built) return true;
  HopperPlan other;
  *error = plan_hopper(narrow, weight, device, &other);
  const int blocks = other.shape.grid.x;
  if (*error == cudaSuccess && blocks <= device.multiprocessors && other.longest < plan->longest) {
    *kernel = narrow;
    *plan = other;
  }
  return true;
}

Status launch_hopper(const LowBitLinearParams& params, const HopperLinear& kernel,
                     const HopperPlan& plan, void* stream) {
  const LowBitWeight& weight = params.weight;
  const int k_tiles = tile_columns(weight);
  const cuuint64_t rows = tile_rows(weight);
  HopperLinearParams launch_params{};
  launch_params.out = params.out;
  launch_params.num_tokens = params.num_tokens;
  launch_params.out_features = weight.out_features;
  const int steps = (k_tiles + kernel.k_tiles - 1) / kernel.k_tiles;
  launch_params.rank_steps = steps / plan.shape.cluster;
  launch_params.longer_ranks = steps % plan.shape.cluster;
  launch_params.num_stages = plan.num_stages;
  launch_params.sums_at = plan.sums_at;
  launch_params.tile_groups = scale_groups(weight);
  launch_params.group_shift = group_shift(weight);
  launch_params.zero = weight.zero;
  const void* x = nullptr;
  const cudaError_t error = find_x(params, stream, &x);
  if (error != cudaSuccess) return launch_status(kOp, error);

  // A box is at most 256 numbers wide.
  const bool is_wide = weight.bits == 8;
  const cuuint32_t word = is_wide ? 8 : 4;
  const cuuint32_t words = static_cast<cuuint32_t>(tile_bytes(weight)) / word;
  const cuuint32_t tiles = kernel.tiles;
  launch_params.code_words = static_cast<int32_t>(words);
  Status status = encode_map(
      kOp, is_wide ? CU_TENSOR_MAP_DATA_TYPE_FLOAT64 : CU_TENSOR_MAP_DATA_TYPE_UINT32,
      weight.qweight, {cuuint64_t{words} * k_tiles, rows}, {cuuint64_t{words} * word * k_tiles},
      {words, tiles}, CU_TENSOR_MAP_SWIZZLE_NONE, &launch_params.codes);
  if (!status.ok()) return status;
  status = encode_scales(weight, kernel.tiles, launch_params.tile_groups, &launch_params.scales);
  if (!status.ok()) return status;
  // Rows of a box that x does not have would come slowly. What a product swizzles has eight.
  const int box_tokens = (params.num_tokens + 7) / 8 * 8;
  launch_params.x_tile_bytes = box_tokens * kXRowBytes;
  status = encode_x(params, x, 1, box_tokens, &launch_params.x);
  if (!status.ok()) return status;
  return launch_status(kOp, launch(kernel.kernel, plan.shape, stream, launch_params));
}

}  // namespace

int64_t low_bit_linear_workspace(const LowBitLinearParams& params) {
  if (!is_arranged(params.weight, params.num_tokens)) return 0;
  return int64_t{2} * params.num_tokens * params.weight.in_features;
}

Status run_low_bit_linear(const LowBitLinearParams& params, void* stream) {
  Status status = validate(params);
  if (!status.ok()) return status;
  const LowBitWeight& weight = params.weight;
  const auto is_aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kBulkAlignment == 0;
  };
  Check check(kOp);
  check
      .require(params.dtype != kFloat32, "dtype", std::to_string(params.dtype),
               "1 (float16) or 2 (bfloat16) on a GPU")
      .require(params.num_tokens <= kMaxDecodeTokens, "num_tokens",
               std::to_string(params.num_tokens),
               "at most " + std::to_string(kMaxDecodeTokens) + " on a GPU")
      .require(weight.in_features % kTileColumns == 0, "in_features",
               std::to_string(weight.in_features),
               "a multiple of " + std::to_string(kTileColumns) + " on a GPU")
      .require(is_aligned(params.x) && is_aligned(weight.qweight) && is_aligned(weight.scales) &&
                   is_aligned(params.workspace),
               "the address of x, qweight, scales or workspace", "odd",
               "a multiple of 16 on a GPU");
  if (!check.ok()) return check.status();
  status = check_workspace(kOp, params.workspace, params.workspace_bytes,
                           low_bit_linear_workspace(params));
  if (!status.ok() || params.num_tokens == 0) return status;
  Device device;
  status = current_device(kOp, &device);
  if (!status.ok()) return status;
  check.require(device.major >= 8, "compute capability",
                std::to_string(device.major) + "." + std::to_string(device.minor),
                "8.0 (Ampere) or later");
  if (!check.ok()) return check.status();

  OneTokenLinear one_token;
  OneTokenParams one_token_params{};
  LaunchShape one_token_shape;
  if (plan_one_token(params, device, &one_token, &one_token_params, &one_token_shape)) {
    return launch_one_token(params, one_token, one_token_params, one_token_shape, stream);
  }
  EvenSharesPlan even_shares;
  if (plan_even_shares(params, device, &even_shares)) {
    return launch_even_shares(params, even_shares, stream);
  }
  int stages = 0;
  FewTokensLinear few_tokens;
  LaunchShape few_tokens_shape;
  if (plan_few_tokens(params, device, &few_tokens, &few_tokens_shape, &stages)) {
    return launch_few_tokens(params, few_tokens, few_tokens_shape, stages, stream);
  }
  HopperLinear hopper;
  HopperPlan hopper_plan;
  cudaError_t hopper_error = cudaSuccess;
  if (find_hopper(params, device, &hopper, &hopper_plan, &hopper_error)) {
    if (hopper_error != cudaSuccess) return launch_status(kOp, hopper_error);
    return launch_hopper(params, hopper, hopper_plan, stream);
  }
  Plan plan;
  if (!plan_launch(params, device, &plan)) {
    return {std::string(kOp) + ": a block may use " + std::to_string(device.shared_bytes) +
            " bytes of shared memory on this GPU, which are too few"};
  }
  cudaError_t error = cudaSuccess;
  for (int first = 0; error == cudaSuccess && first < params.num_tokens; first += plan.tokens) {
    error = launch_linear(params, first, plan, device, stream);
  }
  return launch_status(kOp, error);
}

}  // namespace cuda
}  // namespace minicpm41
