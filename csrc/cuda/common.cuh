// What every kernel shares: the geometry served, the PTX it is made of, and the one way to launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <string>
#include <vector>

#include "launch.h"
#include "validate.h"

namespace minicpm41 {
namespace cuda {

// The 16 query heads of a kv head are the 16 rows of one mma.m16n8k16 tile.
constexpr int kHeadDim = 128;
constexpr int kGroupSize = 16;
constexpr int kWarpSize = 32;
constexpr int kRowBytes = kHeadDim * 2;
constexpr int kChunkBytes = 16;  // one cp.async, one ldmatrix row
constexpr int kRowChunks = kRowBytes / kChunkBytes;
constexpr int kKSteps = kHeadDim / 16;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// ---- host: what device this is, what is served, and launching ----

struct Device {
  int major = 0;
  int minor = 0;
  int shared_bytes = 0;  // a block may ask for
  int multiprocessors = 0;
  bool has_clusters() const { return major >= 9; }
};

// The current device, its attributes read once.
inline Status current_device(const char* op, Device* device) {
  constexpr int kMaxDevices = 64;
  static thread_local Device known[kMaxDevices];
  int id = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess && id < kMaxDevices && known[id].shared_bytes > 0) {
    *device = known[id];
    return {};
  }
  Device found;
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, id);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&found.minor, cudaDevAttrComputeCapabilityMinor, id);
  }
  if (error == cudaSuccess) {
    error =
        cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, id);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // not sticky: the next launch must not find it
    return {std::string(op) + ": no usable GPU: " + cudaGetErrorString(error)};
  }
  if (id < kMaxDevices) known[id] = found;
  *device = found;
  return {};
}

// The geometry the kernels are compiled for; `device` receives the current one.
inline Status check_geometry(const char* op, const Heads& heads, Device* device,
                             bool reads_queries = true) {
  Check check(op);
  check
      .require(heads.dtype == kFloat16 || heads.dtype == kBFloat16, "dtype",
               std::to_string(heads.dtype), "1 (float16) or 2 (bfloat16) on a GPU")
      .require(heads.head_dim == kHeadDim, "head_dim", std::to_string(heads.head_dim),
               std::to_string(kHeadDim) + " on a GPU");
  if (check.ok() && reads_queries) {
    check.require(heads.num_q_heads == heads.num_kv_heads * kGroupSize, "num_q_heads",
                  std::to_string(heads.num_q_heads),
                  std::to_string(kGroupSize) + " for each of " +
                      std::to_string(heads.num_kv_heads) + " kv heads on a GPU");
  }
  if (!check.ok()) return check.status();
  Status status = current_device(op, device);
  if (!status.ok()) return status;
  return check
      .require(device->major >= 8, "compute capability",
               std::to_string(device->major) + "." + std::to_string(device->minor),
               "8.0 (Ampere) or later")
      .status();
}

struct LaunchShape {
  dim3 grid;
  int threads = 0;
  int shared_bytes = 0;
  int cluster = 1;       // blocks along x that share memory; over 1 on sm_90 and later only
  bool overlap = false;  // programmatic dependent launch; sm_90 and later only
};

template <typename... Args>
cudaError_t launch(void (*kernel)(Args...), const LaunchShape& shape, void* stream, Args... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
  }
  if (shape.overlap) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args...);
}

inline Status launch_status(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {std::string(op) + ": the launch failed: " + cudaGetErrorName(error) + ", " +
          cudaGetErrorString(error)};
}

// Readies a kernel for blocks of `threads` and `shared_bytes` and says how many clusters of
// `cluster` of them the device runs side by side.
template <typename... Args>
cudaError_t count_clusters(void (*kernel)(Args...), int threads, int shared_bytes, int cluster,
                           int* count) {
  struct Known {
    const void* kernel;
    int device, shared_bytes, cluster, count;
  };
  static std::mutex guard;
  static std::vector<Known> known;
  const std::lock_guard<std::mutex> lock(guard);
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const void* address = reinterpret_cast<const void*>(kernel);
  // The attribute is the kernel's, not the launch's: never lower what another shape needs.
  int largest = shared_bytes;
  for (const Known& one : known) {
    if (one.kernel != address || one.device != device) continue;
    if (one.shared_bytes == shared_bytes && one.cluster == cluster) {
      *count = one.count;
      return cudaSuccess;
    }
    largest = std::max(largest, one.shared_bytes);
  }
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, largest);
  constexpr int kPortableCluster = 8;
  if (error == cudaSuccess && cluster > kPortableCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  int found = 0;
  if (error == cudaSuccess && cluster > 1) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(cluster);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    // A device without room for such a cluster answers 0 or an error.
    if (cudaOccupancyMaxActiveClusters(&found, kernel, &config) != cudaSuccess) found = 0;
    cudaGetLastError();
  } else if (error == cudaSuccess) {
    int multiprocessors = 0;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, threads, shared_bytes);
    }
    found *= multiprocessors;
  }
  if (error != cudaSuccess) return error;
  known.push_back({address, device, shared_bytes, cluster, found});
  *count = found;
  return cudaSuccess;
}

// ---- device: numbers ----

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  static __device__ __forceinline__ uint32_t pack(float x, float y) {
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
};
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
  }
};

// Adds the eight numbers of a chunk of a row.
template <typename T>
__device__ __forceinline__ void add_chunk(const uint4& chunk, float (&sums)[8]) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&chunk);
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float2 pair = Pair<T>::unpack(words[word]);
    sums[2 * word] += pair.x;
    sums[2 * word + 1] += pair.y;
  }
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- device: matrix products and copies ----

template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1);
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                           uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory past L1, or 16 zero bytes without reading anything.
__device__ __forceinline__ void copy_chunk(uint32_t target, const void* source, bool read) {
  const int bytes = read ? kChunkBytes : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Where chunk `chunk` of row `row` lies in a tile of 256-byte rows: the 8 rows of an 8x8 matrix
// fall into 8 different groups of banks.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

// Query heads of one kv head as the A operand of all kKSteps products. `q` is the first head's row.
template <typename T>
__device__ __forceinline__ void load_q(uint32_t (&a)[kKSteps][4], const T* q, int lane) {
  const uint32_t* upper = reinterpret_cast<const uint32_t*>(q + (lane / 4) * kHeadDim);
  const uint32_t* lower = upper + 8 * kHeadDim / 2;
#pragma unroll
  for (int step = 0; step < kKSteps; ++step) {
    const int column = step * 8 + lane % 4;
    a[step][0] = upper[column];
    a[step][1] = lower[column];
    a[step][2] = upper[column + 4];
    a[step][3] = lower[column + 4];
  }
}

// ---- device: programmatic dependent launch and clusters, empty before sm_90 ----

// Lets the next launch of the stream start; it still waits for this one where it calls
// wait_for_previous_launch.
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Returns when everything the previous launch wrote is visible.
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}
// Says only that this block has come so far: its writes need not be visible, which takes long.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
}  // namespace cuda
}  // namespace minicpm41
