#include "cpu/number.h"
#include "cpu/parallel.h"
#include "cpu/settings.h"
#include "cpu/step.h"

namespace minicpm41::cpu {
namespace {

// Windows of both sizes are whole strides of 16 keys, so each stride is summed once.
constexpr int kStridesPerFine = kKernelSize / kKernelStride;
constexpr int kStridesPerCoarse = kCoarseKernelSize / kKernelStride;
static_assert(kStridesPerCoarse == 2 * kFineSlots, "a coarse window is two blocks");

template <typename T>
void write_mean(const float (*sums)[kMaxHeadDim], int num_sums, int head_dim, T* to) {
  for (int d = 0; d < head_dim; ++d) {
    float sum = sums[0][d];
    for (int i = 1; i < num_sums; ++i) sum += sums[i][d];
    to[d] = narrow<T>(sum / (num_sums * kKernelStride));
  }
}

// The windows whose last token lies in `block`, of one kv head.
template <typename T>
void compress_block(const CompressKeysParams& params, int request, int head, int block, int from) {
  const Batch& batch = params.batch;
  const int head_dim = params.heads.head_dim;
  const int end = kv_len(batch, request);
  const int64_t own = page(batch, request, block) * params.heads.num_kv_heads + head;

  // Sums of the strides of the block before and of this one; sums[kFineSlots + s] ends at slot s.
  float sums[2 * kFineSlots][kMaxHeadDim];
  bool summed[2 * kFineSlots] = {};
  auto sum_stride = [&](int i) {
    if (summed[i]) return;
    summed[i] = true;
    const int64_t source =
        i < kFineSlots ? page(batch, request, block - 1) * params.heads.num_kv_heads + head : own;
    const T* keys = static_cast<const T*>(params.k_cache) +
                    (source * kBlockSize + i % kFineSlots * kKernelStride) * head_dim;
    for (int d = 0; d < head_dim; ++d) sums[i][d] = widen(keys[d]);
    for (int key = 1; key < kKernelStride; ++key) {
      for (int d = 0; d < head_dim; ++d) sums[i][d] += widen(keys[key * head_dim + d]);
    }
  };

  for (int slot = 0; slot < kFineSlots; ++slot) {
    const int last = block * kBlockSize + (slot + 1) * kKernelStride - 1;
    if (last < from || last >= end || last + 1 < kKernelSize) continue;
    const int first = kFineSlots + slot + 1 - kStridesPerFine;
    for (int i = 0; i < kStridesPerFine; ++i) sum_stride(first + i);
    write_mean(sums + first, kStridesPerFine, head_dim,
               static_cast<T*>(params.k1_cache) + (own * kFineSlots + slot) * head_dim);
  }
  const int last = (block + 1) * kBlockSize - 1;
  if (last < from || last >= end || last + 1 < kCoarseKernelSize) return;
  for (int i = 0; i < kStridesPerCoarse; ++i) sum_stride(i);
  write_mean(sums, kStridesPerCoarse, head_dim,
             static_cast<T*>(params.k2_cache) + own * kCoarseSlots * head_dim);
}

}  // namespace

Status run_compress_keys(const CompressKeysParams& params, void* /*stream*/) {
  constexpr const char* kOp = "compress_keys";
  const Batch& batch = params.batch;
  Settings settings;
  for (const Status& status : {validate(params), read_settings(kOp, settings)}) {
    if (!status.ok()) return status;
  }
  if (const Status status = check_values(kOp, batch); !status.ok()) return status;

  struct Item {
    int request, head, block, from;
  };
  std::vector<Item> items;
  const int32_t* compress_from = params.compress_from ? params.compress_from : batch.history_lens;
  for (int b = 0; b < batch.batch_size; ++b) {
    if (batch.query_lens[b] == 0) continue;
    const int from = compress_from[b];
    if (from < 0) return Check(kOp).at_least(at("compress_from", b).c_str(), from, 0).status();
    // A window ends every 16 tokens: most decode steps have nothing to do.
    if (from / kKernelStride == kv_len(batch, b) / kKernelStride) continue;
    for (int block = from / kBlockSize; block * kBlockSize < kv_len(batch, b); ++block) {
      for (int head = 0; head < params.heads.num_kv_heads; ++head) {
        items.push_back({b, head, block, from});
      }
    }
  }
  constexpr int kItemsPerThread = 16;
  const int num_items = static_cast<int>(items.size());
  const int num_threads = std::min(settings.num_threads, num_items / kItemsPerThread + 1);
  with_storage_type(params.heads.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(num_threads, num_items, [&](int, int64_t i) {
      compress_block<T>(params, items[i].request, items[i].head, items[i].block, items[i].from);
    });
  });
  return {};
}

}  // namespace minicpm41::cpu
