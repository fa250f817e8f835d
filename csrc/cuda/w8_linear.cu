#include "low_bit_linear_sm90.cuh"

namespace minicpm41 {
namespace cuda {

LinearKernel w8_linear_kernel(int32_t dtype, int num_tokens, bool has_many_rows) {
  return kernel_for<8>(dtype, num_tokens, has_many_rows);
}

HopperLinear w8_linear_sm90(int32_t dtype, int num_tokens, bool narrow) {
  return sm90_kernel_for<8>(dtype, num_tokens, narrow);
}

}  // namespace cuda
}  // namespace minicpm41
