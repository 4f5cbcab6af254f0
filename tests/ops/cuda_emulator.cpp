// The operators of csrc/*/cuda.cu as torch.ops.vrwkv_emulated, for tensors on the CPU.
#include "cuda_emulator.h"

#include <torch/library.h>

#include <utility>

#include "operators.h"

namespace {

// Of shared memory, less of which means shorter tiles, and whether threads come in the reverse order.
void set_device(int64_t shared_bytes, bool is_reversed) {
  emulator::shared_limit = shared_bytes;
  emulator::is_reversed = is_reversed;
}

// Calls of the careful way, and launches, since the last time.
std::tuple<int64_t, int64_t> take_counts() {
  return {std::exchange(emulator::careful_calls, 0), std::exchange(emulator::launches, 0)};
}

}  // namespace

TORCH_LIBRARY(vrwkv_emulated, m) {
  m.def("set_device", set_device);
  m.def("take_counts", take_counts);
  m.def("bi_wkv_forward", vrwkv_cuda::bi_wkv_forward);
  m.def("bi_wkv_backward", vrwkv_cuda::bi_wkv_backward);
  m.def("bi_wkv6_forward", vrwkv_cuda::bi_wkv6_forward);
  m.def("bi_wkv6_backward", vrwkv_cuda::bi_wkv6_backward);
  // The dispatcher leaves out arguments that have their default value.
  m.def("q_shift(Tensor x, int height, int width, int shift_pixel, float channel_gamma, bool reverse, int heads=1) -> Tensor",
        vrwkv_cuda::q_shift);
  m.def(
      "token_shift_forward(Tensor x, Tensor mixes, int height, int width, int shift_pixel, float channel_gamma, str mode, "
      "int heads=1) -> Tensor[]",
      vrwkv_cuda::token_shift_forward);
  m.def(
      "token_shift_backward(Tensor[] grads, Tensor x, Tensor mixes, int height, int width, int shift_pixel, "
      "float channel_gamma, str mode, int heads=1) -> (Tensor, Tensor)",
      vrwkv_cuda::token_shift_backward);
  m.def("ms_deform_attn", vrwkv_cuda::ms_deform_attn);
  m.def("ms_deform_attn_backward", vrwkv_cuda::ms_deform_attn_backward);
  m.def("squared_relu", vrwkv_cuda::squared_relu);
  m.def("squared_relu_backward", vrwkv_cuda::squared_relu_backward);
  m.def("sigmoid_gate", vrwkv_cuda::sigmoid_gate);
  m.def("sigmoid_gate_backward", vrwkv_cuda::sigmoid_gate_backward);
}
