// Checks, allocations and dispatch over dtypes of the element-wise functions, for a Backend that has
//   template <PointwiseFunction, typename scalar_t> static void run(const PointwiseParams<scalar_t>&, int64_t count);
#pragma once

#include <array>
#include <tuple>

#include "../common/tensor.h"
#include "params.h"

namespace vrwkv_ops {

template <typename Backend, PointwiseFunction function, size_t kOutputs, size_t kInputs>
std::array<at::Tensor, kOutputs> pointwise(const char* name, const std::array<at::Tensor, kInputs>& inputs) {
  for (const auto& x : inputs)
    TORCH_CHECK(
        x.sizes() == inputs[0].sizes() && x.scalar_type() == inputs[0].scalar_type() && x.device() == inputs[0].device(), name,
        ": expected tensors of one shape, type and device, got ", inputs[0].sizes(), " ", inputs[0].scalar_type(), " and ",
        x.sizes(), " ", x.scalar_type());
  std::array<at::Tensor, kInputs> dense;
  for (size_t n = 0; n < kInputs; ++n) dense[n] = inputs[n].contiguous();
  std::array<at::Tensor, kOutputs> outputs;
  for (auto& y : outputs) y = at::empty(dense[0].sizes(), dense[0].options());
  if (dense[0].numel() == 0) return outputs;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dense[0].scalar_type(), "pointwise", [&] {
    PointwiseParams<scalar_t> p{};
    for (size_t n = 0; n < kInputs; ++n) p.in[n] = dense[n].template const_data_ptr<scalar_t>();
    for (size_t n = 0; n < kOutputs; ++n) p.out[n] = outputs[n].template mutable_data_ptr<scalar_t>();
    Backend::template run<function>(p, dense[0].numel());
  });
  return outputs;
}

}  // namespace vrwkv_ops

// Defines the operators of one device. The statement `guard(x)` runs first.
#define VRWKV_DEFINE_POINTWISE(Backend, guard)                                                                                 \
  at::Tensor squared_relu(const at::Tensor& x) {                                                                               \
    guard(x);                                                                                                                  \
    return vrwkv_ops::pointwise<Backend, vrwkv_ops::kSquaredRelu, 1, 1>("squared_relu", {x})[0];                               \
  }                                                                                                                            \
  at::Tensor squared_relu_backward(const at::Tensor& grad, const at::Tensor& x) {                                              \
    guard(x);                                                                                                                  \
    return vrwkv_ops::pointwise<Backend, vrwkv_ops::kSquaredReluBackward, 1, 2>("squared_relu_backward", {grad, x})[0];        \
  }                                                                                                                            \
  at::Tensor sigmoid_gate(const at::Tensor& r, const at::Tensor& x) {                                                          \
    guard(x);                                                                                                                  \
    return vrwkv_ops::pointwise<Backend, vrwkv_ops::kSigmoidGate, 1, 2>("sigmoid_gate", {r, x})[0];                            \
  }                                                                                                                            \
  std::tuple<at::Tensor, at::Tensor> sigmoid_gate_backward(const at::Tensor& grad, const at::Tensor& r, const at::Tensor& x) { \
    guard(x);                                                                                                                  \
    const auto [gr, gx] =                                                                                                      \
        vrwkv_ops::pointwise<Backend, vrwkv_ops::kSigmoidGateBackward, 2, 3>("sigmoid_gate_backward", {grad, r, x});           \
    return {gr, gx};                                                                                                           \
  }
