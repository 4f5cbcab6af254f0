// The operators as the dispatcher calls them (schemas: dispatch.cpp).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <tuple>
#include <vector>

#define VRWKV_DECLARE_OPS(device)                                                                                            \
  namespace vrwkv_##device {                                                                                                 \
    std::tuple<at::Tensor, at::Tensor, at::Tensor> bi_wkv_forward(                                                           \
        const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v, bool causal, bool save);         \
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv_backward(                                              \
        const at::Tensor& gy, const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,            \
        const at::Tensor& y, const at::Tensor& y_residual, const at::Tensor& z, bool causal);                                \
    at::Tensor bi_wkv6_forward(const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,           \
                               const at::Tensor& u, bool causal);                                                            \
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv6_backward(                                 \
        const at::Tensor& gy, const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,            \
        const at::Tensor& u, bool causal);                                                                                   \
    at::Tensor q_shift(const at::Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma,        \
                       bool reverse, int64_t heads);                                                                         \
    std::vector<at::Tensor> token_shift_forward(const at::Tensor& x, const at::Tensor& mixes, int64_t height, int64_t width, \
                                                int64_t shift_pixel, double channel_gamma, c10::string_view mode,            \
                                                int64_t heads);                                                              \
    std::tuple<at::Tensor, at::Tensor> token_shift_backward(                                                                 \
        at::TensorList grads, const at::Tensor& x, const at::Tensor& mixes, int64_t height, int64_t width,                   \
        int64_t shift_pixel, double channel_gamma, c10::string_view mode, int64_t heads);                                    \
    at::Tensor ms_deform_attn(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,                  \
                              const at::Tensor& weights);                                                                    \
    std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(                                                  \
        const at::Tensor& grad, const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,                \
        const at::Tensor& weights);                                                                                          \
    at::Tensor squared_relu(const at::Tensor& x);                                                                            \
    at::Tensor squared_relu_backward(const at::Tensor& grad, const at::Tensor& x);                                           \
    at::Tensor sigmoid_gate(const at::Tensor& r, const at::Tensor& x);                                                       \
    std::tuple<at::Tensor, at::Tensor> sigmoid_gate_backward(const at::Tensor& grad, const at::Tensor& r,                    \
                                                             const at::Tensor& x);                                           \
  }

VRWKV_DECLARE_OPS(cpu)
VRWKV_DECLARE_OPS(cuda)
