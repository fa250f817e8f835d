// The host's side of low_bit_linear: which kernel, how many blocks, how deep a ring; and the
// Hadamard transform of x, which goes first where a weight wants it.
#include "low_bit_linear.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr char kOp[] = "low_bit_linear";
constexpr int kArrangeThreads = 128;
constexpr int kNumbersPerLane = 4;
constexpr int kBulkAlignment = 16;
constexpr int kFewTokens = 8;  // one tile of operand columns

// x in the order in which a stage takes it (LinearKernelParams), or x H, in fp32 and rounded once:
// four neighbours a lane, 16 or 32 lanes a block of H.
template <typename T>
__global__ void __launch_bounds__(kArrangeThreads)
    arrange_kernel(const T* x, T* out, int num_tokens, int in_features, int hadamard) {
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
  const int swap = token % 2 * (kXSwap / static_cast<int>(sizeof(T)));
  const int64_t row = int64_t{column / kTileColumns} * num_tokens + token;
  *reinterpret_cast<uint2*>(out + row * kTileColumns + (column % kTileColumns ^ swap)) = pairs;
}

template <typename T>
cudaError_t launch_arrange(const LowBitLinearParams& params, int first, int num_tokens,
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
                int{params.weight.hadamard});
}

// What one launch takes: as many tokens as leave room for two stages, more stages where they fit.
struct Plan {
  LinearKernel kernel;
  int tokens;
  int stages;
  int shared_bytes;
  bool is_long;
};

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

bool plan_launch(const LowBitLinearParams& params, const Device& device, Plan* plan) {
  const LowBitWeight& weight = params.weight;
  // A row of tiles is a stage for each 16 tiles of it.
  constexpr int kStageTiles = 16, kManyStages = 8;
  const int64_t stages = int64_t{tile_rows(weight)} * tile_columns(weight) / kStageTiles;
  plan->is_long = stages > int64_t{kManyStages} * device.multiprocessors;
  // Then each multiprocessor still gets several blocks.
  const bool has_many_rows = tile_rows(weight) >= kManyStages * device.multiprocessors;
  const auto kernel_of = weight.bits == 2   ? w2_linear_kernel
                         : weight.bits == 4 ? w4_linear_kernel
                                            : w8_linear_kernel;
  for (int tokens = params.num_tokens; tokens > 0; tokens = tokens > 1 ? (tokens + 1) / 2 : 0) {
    // The kernel for the most tokens has the smallest stages: it serves where little memory is.
    for (const int for_tokens : {tokens, kMaxDecodeTokens}) {
      const LinearKernel kernel = kernel_of(params.dtype, for_tokens, has_many_rows);
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
    error = arrange(params, first, num_tokens, device.has_clusters(), stream);
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
  launch_params.group_shift = weight.group == 64 ? 6 : weight.group == 128 ? 7 : 31;
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
