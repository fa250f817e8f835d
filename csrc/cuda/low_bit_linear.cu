#include "common.cuh"

namespace minicpm41 {
namespace cuda {

int64_t low_bit_linear_workspace(const LowBitLinearParams&) { return 0; }

Status run_low_bit_linear(const LowBitLinearParams&, void*) {
  return {"low_bit_linear: not served on a GPU by this version"};
}

Status run_expand_low_bit_weight(const ExpandLowBitWeightParams&, void*) {
  return {"expand_low_bit_weight: not served on a GPU by this version"};
}

}  // namespace cuda
}  // namespace minicpm41
