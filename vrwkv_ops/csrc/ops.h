// The operators of vrwkv_ops as the dispatcher sees them (schemas: src/vrwkv_ops/ops.py), and the checks that the CPU and
// the CUDA versions share. The Python API has better messages; these guard direct calls through torch.ops.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <tuple>

namespace vrwkv_ops {

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

// Shifts a quarter of the channels by `shift_pixel` in each direction; group n ends at boundary(n).
struct ChannelGroups {
  int64_t end[4];

  ChannelGroups(int64_t channels, double gamma) {
    for (int n = 0; n < 4; ++n) end[n] = static_cast<int64_t>(std::floor(channels * gamma * (n + 1)));
  }
};

inline void check_grid(const at::Tensor& x, int64_t height, int64_t width, int64_t shift_pixel) {
  TORCH_CHECK(x.dim() == 3 && height >= 0 && width >= 0 && x.size(1) == height * width,
              "q_shift: expected x of shape (B, height * width, C) with a grid of ", height, " x ", width, ", got ", x.sizes());
  TORCH_CHECK(shift_pixel >= 0, "q_shift: expected shift_pixel >= 0, got ", shift_pixel);
}

}  // namespace vrwkv_ops

#define VRWKV_DECLARE_OPS(device)                                                                                     \
  namespace vrwkv_##device {                                                                                          \
    std::tuple<at::Tensor, at::Tensor, at::Tensor> bi_wkv_forward(                                                    \
        const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v, bool causal, bool save);  \
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv_backward(                                       \
        const at::Tensor& gy, const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,     \
        const at::Tensor& y, const at::Tensor& y_residual, const at::Tensor& z, bool causal);                         \
    at::Tensor q_shift(const at::Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma, \
                       bool reverse);                                                                                 \
  }

VRWKV_DECLARE_OPS(cpu)
VRWKV_DECLARE_OPS(cuda)
