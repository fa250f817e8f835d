// Rotates q in place and writes rotated k and plain v to their pages.
//
// Eight threads a head, each with the 8 dimensions of one chunk of the first half and the 8 they
// are rotated with. Few tokens get a block each, which has the shortest way from start to end; many
// get a warp each, which reads its angles once and keeps several heads in flight. Products and sums
// are rounded one by one, as a framework does it, so both give the same bits.
#include "paged_kv.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr int kRopeThreads = 256;
constexpr int kHalf = kHeadDim / 2;
constexpr int kLanes = kHalf / 8;
// From so many tokens on, a warp each fills the device.
constexpr int kManyTokens = 1024;
constexpr int kHeadsPerWarp = kWarpSize / kLanes;
constexpr int kHeadsInFlight = 3;  // a thread

template <typename T>
__device__ __forceinline__ void rotate(uint4& first, uint4& second, const float* cos,
                                       const float* sin) {
  uint32_t* x = reinterpret_cast<uint32_t*>(&first);
  uint32_t* y = reinterpret_cast<uint32_t*>(&second);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = Pair<T>::unpack(x[i]);
    const float2 b = Pair<T>::unpack(y[i]);
    const float2 c = *reinterpret_cast<const float2*>(cos + 2 * i);
    const float2 s = *reinterpret_cast<const float2*>(sin + 2 * i);
    x[i] = Pair<T>::pack(__fsub_rn(__fmul_rn(a.x, c.x), __fmul_rn(b.x, s.x)),
                         __fsub_rn(__fmul_rn(a.y, c.y), __fmul_rn(b.y, s.y)));
    y[i] = Pair<T>::pack(__fadd_rn(__fmul_rn(b.x, c.x), __fmul_rn(a.x, s.x)),
                         __fadd_rn(__fmul_rn(b.y, c.y), __fmul_rn(a.y, s.y)));
  }
}

template <typename T>
__global__ void __launch_bounds__(kRopeThreads)
    rope_and_write_kv_kernel(const RopeAndWriteKvParams params) {
  const int token = blockIdx.x;
  QueryRow row;
  if (!load_query_row(params.batch, token, &row)) return;
  const int kv_heads = params.heads.num_kv_heads;
  const int q_heads = params.heads.num_q_heads;
  const int page = row.pages[row.position / kBlockSize];
  const int slot = row.position % kBlockSize;
  const int lane = threadIdx.x % kLanes;

  for (int head = threadIdx.x / kLanes; head < q_heads + 2 * kv_heads;
       head += kRopeThreads / kLanes) {
    const T* source;
    T* target;
    if (head < q_heads) {
      target = static_cast<T*>(params.q) + token * params.q_stride + head * kHeadDim;
      source = target;
    } else {
      const bool is_v = head >= q_heads + kv_heads;
      const int kv_head = (head - q_heads) % kv_heads;
      source = is_v ? static_cast<const T*>(params.v) + token * params.v_stride
                    : static_cast<const T*>(params.k) + token * params.k_stride;
      source += kv_head * kHeadDim;
      T* cache = static_cast<T*>(is_v ? params.v_cache : params.k_cache);
      target = const_cast<T*>(slot_row<kBlockSize>(cache, page, kv_heads, kv_head, slot));
      if (page < 0) continue;
    }
    uint4 first = *reinterpret_cast<const uint4*>(source + lane * 8);
    uint4 second = *reinterpret_cast<const uint4*>(source + kHalf + lane * 8);
    if (head < q_heads + kv_heads) {
      const int64_t angle = int64_t{row.position} * kHeadDim + lane * 8;
      rotate<T>(first, second, params.cos + angle, params.sin + angle);
    }
    *reinterpret_cast<uint4*>(target + lane * 8) = first;
    *reinterpret_cast<uint4*>(target + kHalf + lane * 8) = second;
  }
}

template <typename T>
__global__ void __launch_bounds__(kRopeThreads)
    rope_and_write_kv_prefill_kernel(const __grid_constant__ RopeAndWriteKvParams params) {
  const int warps = kRopeThreads / kWarpSize;
  const int token = blockIdx.x * warps + threadIdx.x / kWarpSize;
  QueryRow row;
  if (token >= params.batch.num_tokens || !load_query_row(params.batch, token, &row)) return;
  const int kv_heads = params.heads.num_kv_heads;
  const int q_heads = params.heads.num_q_heads;
  const int heads = q_heads + 2 * kv_heads;
  const int page = row.pages[row.position / kBlockSize];
  const int slot = row.position % kBlockSize;
  const int lane = threadIdx.x % kLanes;
  const int64_t angle = int64_t{row.position} * kHeadDim + lane * 8;
  __align__(16) float cos[8];
  __align__(16) float sin[8];
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    *reinterpret_cast<float4*>(cos + i) = *reinterpret_cast<const float4*>(params.cos + angle + i);
    *reinterpret_cast<float4*>(sin + i) = *reinterpret_cast<const float4*>(params.sin + angle + i);
  }

  for (int base = threadIdx.x % kWarpSize / kLanes; base < heads;
       base += kHeadsInFlight * kHeadsPerWarp) {
    uint4 first[kHeadsInFlight];
    uint4 second[kHeadsInFlight];
    T* targets[kHeadsInFlight];
#pragma unroll
    for (int i = 0; i < kHeadsInFlight; ++i) {
      const int head = base + i * kHeadsPerWarp;
      const T* source = nullptr;
      targets[i] = nullptr;
      if (head < q_heads) {
        targets[i] = static_cast<T*>(params.q) + token * params.q_stride + head * kHeadDim;
        source = targets[i];
      } else if (head < heads && page >= 0) {
        const bool is_v = head >= q_heads + kv_heads;
        const int kv_head = (head - q_heads) % kv_heads;
        source = is_v ? static_cast<const T*>(params.v) + token * params.v_stride
                      : static_cast<const T*>(params.k) + token * params.k_stride;
        source += kv_head * kHeadDim;
        T* cache = static_cast<T*>(is_v ? params.v_cache : params.k_cache);
        targets[i] = const_cast<T*>(slot_row<kBlockSize>(cache, page, kv_heads, kv_head, slot));
      }
      if (source == nullptr) continue;
      first[i] = *reinterpret_cast<const uint4*>(source + lane * 8);
      second[i] = *reinterpret_cast<const uint4*>(source + kHalf + lane * 8);
    }
#pragma unroll
    for (int i = 0; i < kHeadsInFlight; ++i) {
      if (targets[i] == nullptr) continue;
      if (base + i * kHeadsPerWarp < q_heads + kv_heads) rotate<T>(first[i], second[i], cos, sin);
      *reinterpret_cast<uint4*>(targets[i] + lane * 8) = first[i];
      *reinterpret_cast<uint4*>(targets[i] + kHalf + lane * 8) = second[i];
    }
  }
}

template __global__ void rope_and_write_kv_kernel<__half>(const RopeAndWriteKvParams);
template __global__ void rope_and_write_kv_kernel<__nv_bfloat16>(const RopeAndWriteKvParams);
template __global__ void rope_and_write_kv_prefill_kernel<__half>(
    const __grid_constant__ RopeAndWriteKvParams);
template __global__ void rope_and_write_kv_prefill_kernel<__nv_bfloat16>(
    const __grid_constant__ RopeAndWriteKvParams);

}  // namespace

Status run_rope_and_write_kv(const RopeAndWriteKvParams& params, void* stream) {
  const char* op = "rope_and_write_kv";
  Status status = validate(params);
  if (!status.ok()) return status;
  Device device;
  status = check_geometry(op, params.heads, &device, /*reads_queries=*/false);
  if (!status.ok() || params.batch.num_tokens == 0) return status;
  const bool is_half = params.heads.dtype == kFloat16;
  LaunchShape shape;
  shape.threads = kRopeThreads;
  if (params.batch.num_tokens < kManyTokens) {
    shape.grid = dim3(params.batch.num_tokens);
    const auto kernel =
        is_half ? rope_and_write_kv_kernel<__half> : rope_and_write_kv_kernel<__nv_bfloat16>;
    return launch_status(op, launch(kernel, shape, stream, params));
  }
  const int warps = kRopeThreads / kWarpSize;
  shape.grid = dim3((params.batch.num_tokens + warps - 1) / warps);
  const auto kernel = is_half ? rope_and_write_kv_prefill_kernel<__half>
                              : rope_and_write_kv_prefill_kernel<__nv_bfloat16>;
  return launch_status(op, launch(kernel, shape, stream, params));
}

}  // namespace cuda
}  // namespace minicpm41
