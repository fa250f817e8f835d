#include "cpu/number.h"
#include "cpu/parallel.h"
#include "cpu/settings.h"
#include "cpu/step.h"

namespace minicpm41::cpu {
namespace {

// Rotates one head's NeoX halves; `to` may be `from`.
template <typename T>
void rotate(const T* from, const float* cos, const float* sin, int head_dim, T* to) {
  const int half = head_dim / 2;
  for (int d = 0; d < half; ++d) {
    const float first = widen(from[d]), second = widen(from[d + half]);
    to[d] = narrow<T>(first * cos[d] - second * sin[d]);
    to[d + half] = narrow<T>(second * cos[d + half] + first * sin[d + half]);
  }
}

template <typename T>
void rope_and_write_kv(const RopeAndWriteKvParams& params, int token) {
  const Batch& batch = params.batch;
  const int request = batch.batch_id_per_token[token];
  if (request < 0) return;
  const auto [num_q_heads, num_kv_heads, head_dim, dtype] = params.heads;
  const int at = position(batch, request, token);
  const float* cos = params.cos + int64_t{at} * head_dim;
  const float* sin = params.sin + int64_t{at} * head_dim;
  T* q = static_cast<T*>(params.q) + token * params.q_stride;
  for (int head = 0; head < num_q_heads; ++head) {
    rotate(q + head * head_dim, cos, sin, head_dim, q + head * head_dim);
  }
  const T* k = static_cast<const T*>(params.k) + token * params.k_stride;
  const T* v = static_cast<const T*>(params.v) + token * params.v_stride;
  const int64_t first_head = page(batch, request, at / kBlockSize) * num_kv_heads;
  for (int head = 0; head < num_kv_heads; ++head) {
    const int64_t row = ((first_head + head) * kBlockSize + at % kBlockSize) * head_dim;
    rotate(k + head * head_dim, cos, sin, head_dim, static_cast<T*>(params.k_cache) + row);
    std::copy_n(v + head * head_dim, head_dim, static_cast<T*>(params.v_cache) + row);
  }
}

}  // namespace

Status run_rope_and_write_kv(const RopeAndWriteKvParams& params, void* /*stream*/) {
  constexpr const char* kOp = "rope_and_write_kv";
  const Batch& batch = params.batch;
  Settings settings;
  if (const Status status = prepare_rows(kOp, params, settings); !status.ok()) return status;
  for (int b = 0; b < batch.batch_size; ++b) {
    if (batch.query_lens[b] == 0 || kv_len(batch, b) <= params.max_position) continue;
    return Check(kOp)
        .require(false, at("history_lens", b) + " + query_lens", std::to_string(kv_len(batch, b)),
                 "at most " + std::to_string(params.max_position) + ", the rows of cos and sin")
        .status();
  }
  // A token is a few microseconds of work: below this many, a thread costs more than it brings.
  constexpr int kTokensPerThread = 16;
  const int num_threads = std::min(settings.num_threads, batch.num_tokens / kTokensPerThread + 1);
  with_storage_type(params.heads.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(num_threads, batch.num_tokens, [&](int, int64_t token) {
      rope_and_write_kv<T>(params, static_cast<int>(token));
    });
  });
  return {};
}

}  // namespace minicpm41::cpu
