// From tensors to the side that has them: CPU tensors to cpu::, GPU tensors to cuda::, on Paddle's
// stream.
#pragma once

#include <string>

#include "capi.h"
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/include/api.h"

namespace minicpm41::binding {

inline void* stream_of(const paddle::Tensor& tensor) {
#ifdef PADDLE_WITH_CUDA
  return tensor.stream();
#else
  static_cast<void>(tensor);
  return nullptr;
#endif
}

template <typename Params>
void launch(const paddle::Tensor& on, int (*cpu)(const Params*), int (*cuda)(const Params*, void*),
            const Params& params) {
  const int failed = on.is_cpu() ? cpu(&params) : cuda(&params, stream_of(on));
  if (failed) PD_THROW(std::string("minicpm41_") + minicpm41_last_error());
}

// Gives a CUDA launch the scratch it wants, from Paddle's allocator, which reuses memory in the
// order of the stream: the returned tensor may go when the launch has been queued.
template <typename Params>
paddle::Tensor with_workspace(const paddle::Tensor& on, int64_t (*bytes)(const Params*),
                              Params& params) {
  if (on.is_cpu()) return {};
  params.workspace_bytes = bytes(&params);
  if (params.workspace_bytes == 0) return {};
  paddle::Tensor workspace =
      paddle::experimental::empty({params.workspace_bytes}, paddle::DataType::UINT8, on.place());
  params.workspace = workspace.data();
  return workspace;
}

}  // namespace minicpm41::binding
