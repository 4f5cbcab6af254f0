// Checks of bi_wkv6 for any backend.
#pragma once

#include <ATen/ops/empty.h>

#include <tuple>

#include "../common/tensor.h"
#include "params.h"

namespace vrwkv_ops {

inline void check_wkv6_inputs(const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
                              const at::Tensor& u) {
  TORCH_CHECK(v.dim() == 3, "bi_wkv6: expected v of shape (B, T, C), got ", v.sizes());
  for (const auto& x : {r, k})
    TORCH_CHECK(x.sizes() == v.sizes() && x.scalar_type() == v.scalar_type(), "bi_wkv6: expected r and k like v (", v.sizes(),
                " ", v.scalar_type(), "), got ", x.sizes(), " ", x.scalar_type());
  const auto accumulation = v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(w.sizes() == v.sizes() && w.scalar_type() == accumulation, "bi_wkv6: expected w of shape ", v.sizes(),
              " and type ", accumulation, ", got ", w.sizes(), " ", w.scalar_type());
  TORCH_CHECK(u.dim() == 2 && u.numel() == v.size(2) && u.size(1) % 8 == 0 && u.size(1) <= kMaxHeadSize &&
                  u.scalar_type() == accumulation,
              "bi_wkv6: expected u of shape (heads, N) and type ", accumulation, ", with heads * N = ", v.size(2),
              " and N a multiple of 8 up to ", kMaxHeadSize, ", got ", u.sizes(), " ", u.scalar_type());
  for (const auto& x : {r, k, w, u})
    TORCH_CHECK(x.device() == v.device(), "bi_wkv6: expected r, k, v, w and u on one device, got ", x.device(), " and ",
                v.device());
}

// The gradients to fill, after a check of what they depend on. That of u has a row for each image.
struct Wkv6Gradients {
  at::Tensor r, k, v, w, u;

  Wkv6Gradients(const at::Tensor& gy, const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
                const at::Tensor& u) {
    check_wkv6_inputs(r, k, v, w, u);
    TORCH_CHECK(gy.sizes() == v.sizes() && gy.scalar_type() == v.scalar_type() && gy.device() == v.device(),
                "bi_wkv6_backward: expected gy like v (", v.sizes(), " ", v.scalar_type(), "), got ", gy.sizes(), " ",
                gy.scalar_type());
    for (at::Tensor* grad : {&this->r, &this->k, &this->v}) *grad = at::empty(v.sizes(), v.options());
    this->w = at::empty(v.sizes(), u.options());
    // No rows if there is nothing to compute: their sum is zero.
    this->u = at::empty({v.numel() == 0 ? 0 : v.size(0), u.size(0), u.size(1)}, u.options());
  }

  // Sums that of u over the images.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sum() const { return {r, k, v, w, sum_partials(u)}; }
};

}  // namespace vrwkv_ops
