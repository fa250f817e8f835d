// Rotates q in place and writes rotated k and plain v to their pages.
//
// One block a token. Eight threads a head, each with the 8 dimensions of one chunk of the first
// half and the 8 they are rotated with. Products and sums are rounded one by one, as a framework
// does it.
#include "paged_kv.cuh"

namespace minicpm41 {
namespace cuda {
namespace {

constexpr int kRopeThreads = 256;
constexpr int kHalf = kHeadDim / 2;
constexpr int kLanes = kHalf / 8;

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

template __global__ void rope_and_write_kv_kernel<__half>(const RopeAndWriteKvParams);
template __global__ void rope_and_write_kv_kernel<__nv_bfloat16>(const RopeAndWriteKvParams);

}  // namespace

Status run_rope_and_write_kv(const RopeAndWriteKvParams& params, void* stream) {
  const char* op = "rope_and_write_kv";
  Status status = validate(params);
  if (!status.ok()) return status;
  Device device;
  status = check_geometry(op, params.heads, &device, /*reads_queries=*/false);
  if (!status.ok() || params.batch.num_tokens == 0) return status;
  LaunchShape shape;
  shape.grid = dim3(params.batch.num_tokens);
  shape.threads = kRopeThreads;
  const auto kernel = params.heads.dtype == kFloat16 ? rope_and_write_kv_kernel<__half>
                                                     : rope_and_write_kv_kernel<__nv_bfloat16>;
  return launch_status(op, launch(kernel, shape, stream, params));
}

}  // namespace cuda
}  // namespace minicpm41
