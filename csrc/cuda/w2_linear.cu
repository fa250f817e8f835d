#include "low_bit_linear_even_shares.cuh"
#include "low_bit_linear_one_token.cuh"

namespace minicpm41 {
namespace cuda {

LinearKernel w2_linear_kernel(int32_t dtype, int num_tokens, bool has_many_rows) {
  return kernel_for<2>(dtype, num_tokens, has_many_rows);
}

HopperLinear w2_linear_sm90(int32_t dtype, int num_tokens, bool narrow) {
  return sm90_kernel_for<2>(dtype, num_tokens, narrow);
}

FewTokensLinear w2_linear_few_tokens(int32_t dtype, int num_tokens) {
  return few_tokens_kernel_for<2>(dtype, num_tokens);
}

EvenSharesLinear w2_linear_even_shares(int32_t dtype, int num_tokens, EvenSharesArrangement how) {
  return even_shares_kernel_for<2>(dtype, num_tokens, how);
}

OneTokenLinear w2_linear_one_token(int32_t dtype, int share) {
  return one_token_kernel_for<2>(dtype, share);
}

}  // namespace cuda
}  // namespace minicpm41
