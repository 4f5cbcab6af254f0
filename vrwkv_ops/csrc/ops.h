// The operators of vrwkv_ops as the dispatcher sees them (schemas: src/vrwkv_ops/ops.py), and the checks that the CPU and
// the CUDA versions share. The Python API has better messages; these guard direct calls through torch.ops.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "problem.h"

namespace vrwkv_ops {

template <typename scalar_t>
View<scalar_t> view(const at::Tensor& x) {
  return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1), x.stride(2)};
}

inline void check_inputs(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK(k.dim() == 3, "bi_wkv: expected k of shape (B, T, C), got ", k.sizes());
  TORCH_CHECK(v.sizes() == k.sizes() && v.scalar_type() == k.scalar_type(), "bi_wkv: expected v like k (", k.sizes(), " ",
              k.scalar_type(), "), got ", v.sizes(), " ", v.scalar_type());
  const auto accumulation = k.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const auto& x : {w, u})
    TORCH_CHECK(x.dim() == 1 && x.size(0) == k.size(2) && x.is_contiguous() && x.scalar_type() == accumulation,
                "bi_wkv: expected w and u contiguous, of shape (", k.size(2), ",) and type ", accumulation, ", got ", x.sizes(),
                " ", x.scalar_type());
  for (const auto& x : {w, u, v})
    TORCH_CHECK(x.device() == k.device(), "bi_wkv: expected w, u, k and v on one device, got ", x.device(), " and ",
                k.device());
}

inline void check_saved(const at::Tensor& k, const at::Tensor& w, const at::Tensor& gy, const at::Tensor& y,
                        const at::Tensor& y_residual, const at::Tensor& z) {
  const bool half = k.element_size() == 2;
  TORCH_CHECK(gy.sizes() == k.sizes() && gy.scalar_type() == k.scalar_type() && gy.device() == k.device(),
              "bi_wkv_backward: expected gy like k (", k.sizes(), " ", k.scalar_type(), "), got ", gy.sizes(), " ",
              gy.scalar_type());
  TORCH_CHECK(y.sizes() == k.sizes() && y.is_contiguous() && y.scalar_type() == k.scalar_type() && z.sizes() == k.sizes() &&
                  z.is_contiguous() && z.scalar_type() == w.scalar_type() && y_residual.numel() == (half ? k.numel() : 0) &&
                  y_residual.is_contiguous() && y_residual.scalar_type() == k.scalar_type(),
              "bi_wkv_backward: expected y, y_residual and z as bi_wkv_forward(..., save=True) gave them");
}

// (pieces, C) -> (C,), added in double and in a fixed order: the same bits every time.
inline at::Tensor sum_partials(const at::Tensor& partials) {
  return at::sum(partials, {0}, false, at::kDouble).to(partials.scalar_type());
}

}  // namespace vrwkv_ops

#define VRWKV_DECLARE_OPS(device)                                                                                              \
  namespace vrwkv_##device {                                                                                                   \
    std::tuple<at::Tensor, at::Tensor, at::Tensor> bi_wkv_forward(                                                             \
        const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v, bool causal, bool save);           \
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv_backward(                                                \
        const at::Tensor& gy, const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,              \
        const at::Tensor& y, const at::Tensor& y_residual, const at::Tensor& z, bool causal);                                  \
    at::Tensor q_shift(const at::Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma,          \
                       bool reverse);                                                                                          \
    std::vector<at::Tensor> token_shift(const at::Tensor& x, const at::Tensor& mixes, int64_t height, int64_t width,           \
                                        int64_t shift_pixel, double channel_gamma, c10::string_view mode);                     \
    std::tuple<at::Tensor, at::Tensor> token_shift_backward(at::TensorList grads, const at::Tensor& x,                         \
                                                            const at::Tensor& mixes, int64_t height, int64_t width,            \
                                                            int64_t shift_pixel, double channel_gamma, c10::string_view mode); \
    at::Tensor squared_relu(const at::Tensor& x);                                                                              \
    at::Tensor squared_relu_backward(const at::Tensor& grad, const at::Tensor& x);                                             \
    at::Tensor sigmoid_gate(const at::Tensor& r, const at::Tensor& x);                                                         \
    std::tuple<at::Tensor, at::Tensor> sigmoid_gate_backward(const at::Tensor& grad, const at::Tensor& r,                      \
                                                             const at::Tensor& x);                                             \
  }

VRWKV_DECLARE_OPS(cpu)
VRWKV_DECLARE_OPS(cuda)
