// Registers the kernels of the operators that dispatch.cpp defines. The CPU and the CUDA library each compile this
// file.
#include <torch/library.h>

#include "operators.h"

#if defined(VRWKV_OPS_WITH_CUDA)
namespace kernels = vrwkv_cuda;
TORCH_LIBRARY_IMPL(vrwkv_ops, CUDA, m) {
#else
namespace kernels = vrwkv_cpu;
TORCH_LIBRARY_IMPL(vrwkv_ops, CPU, m) {
#endif
  m.impl("bi_wkv_forward", kernels::bi_wkv_forward);
  m.impl("bi_wkv_backward", kernels::bi_wkv_backward);
  m.impl("bi_wkv6_forward", kernels::bi_wkv6_forward);
  m.impl("bi_wkv6_backward", kernels::bi_wkv6_backward);
  m.impl("q_shift", kernels::q_shift);
  m.impl("token_shift_forward", kernels::token_shift_forward);
  m.impl("token_shift_backward", kernels::token_shift_backward);
  m.impl("ms_deform_attn", kernels::ms_deform_attn);
  m.impl("ms_deform_attn_backward", kernels::ms_deform_attn_backward);
  m.impl("squared_relu", kernels::squared_relu);
  m.impl("squared_relu_backward", kernels::squared_relu_backward);
  m.impl("sigmoid_gate", kernels::sigmoid_gate);
  m.impl("sigmoid_gate_backward", kernels::sigmoid_gate_backward);
}
