// Checks, allocations and dispatch over dtypes of the Bi-WKV operators, for a Backend that has
//   template <typename P> static int64_t chunk_length(int64_t tokens);  // depends on sizes only, so that results do
//   template <typename P> static void run(const P&, bool causal);    // P is WkvForwardParams or WkvBackwardParams
//   static std::tuple<at::Tensor, at::Tensor> sum_partials(const at::Tensor& gw, const at::Tensor& gu);  // over dimension 0
#pragma once

#include <ATen/ops/empty_like.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../common/tensor.h"
#include "params.h"
#include "state.h"

namespace vrwkv_ops {

inline void check_wkv_inputs(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v) {
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

inline void check_wkv_saved(const at::Tensor& k, const at::Tensor& w, const at::Tensor& gy, const at::Tensor& y,
                            const at::Tensor& y_residual, const at::Tensor& z) {
  const bool half = k.element_size() == 2;
  TORCH_CHECK(gy.sizes() == k.sizes() && gy.scalar_type() == k.scalar_type() && gy.device() == k.device(),
              "bi_wkv_backward: expected gy like k (", k.sizes(), " ", k.scalar_type(), "), got ", gy.sizes(), " ",
              gy.scalar_type());
  TORCH_CHECK(y.sizes() == k.sizes() && y.is_contiguous() && y.scalar_type() == k.scalar_type() && z.sizes() == k.sizes() &&
                  z.is_contiguous() && z.scalar_type() == w.scalar_type() && y_residual.numel() == (half ? k.numel() : 0) &&
                  y_residual.is_contiguous() && y_residual.scalar_type() == k.scalar_type() && y.device() == k.device() &&
                  z.device() == k.device() && y_residual.device() == k.device(),
              "bi_wkv_backward: expected y, y_residual and z as bi_wkv_forward(..., save=True) gave them");
}

// Fills the parameters that both passes share, and owns the memory that their kernels share.
template <typename P>
struct WkvWorkspace {
  at::Tensor states;

  WkvWorkspace(P& p, int64_t chunk_length, int state_fields, const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
               const at::Tensor& v) {
    using scalar_t = typename P::scalar_type;
    using acc_t = typename P::acc_t;
    p.batch = k.size(0), p.tokens = k.size(1), p.channels = k.size(2);
    p.chunk_length = chunk_length, p.chunks = ceil_div(p.tokens, chunk_length);
    // A term is below 16 times its value: the mantissas of key, decay and chunk are below 2 each, and three sums are added.
    p.headroom = static_cast<acc_t>(std::ldexp(0.0625, -static_cast<int>(std::ceil(std::log2(p.tokens)))));
    p.w = w.const_data_ptr<acc_t>(), p.u = u.const_data_ptr<acc_t>();
    p.k = view<scalar_t>(k), p.v = view<scalar_t>(v);
    if (p.chunks > 1) states = at::empty({2, state_fields, p.batch, p.chunks, p.channels}, w.options());
    p.states = p.chunks > 1 ? states.mutable_data_ptr<acc_t>() : nullptr;
  }
};

template <typename Backend>
std::tuple<at::Tensor, at::Tensor, at::Tensor> bi_wkv_forward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                                                              const at::Tensor& v, bool causal, bool save) {
  check_wkv_inputs(w, u, k, v);
  const auto sizes_if = [&](bool wanted) { return wanted ? k.sizes().vec() : std::vector<int64_t>{0}; };
  const at::Tensor y = at::empty(k.sizes(), k.options());
  const at::Tensor y_residual = at::empty(sizes_if(save && k.element_size() == 2), k.options());
  const at::Tensor z = at::empty(sizes_if(save), w.options());
  if (k.numel() == 0) return {y, y_residual, z};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, k.scalar_type(), "bi_wkv_forward", [&] {
    WkvForwardParams<scalar_t> p;
    const WkvWorkspace workspace(p, Backend::template chunk_length<decltype(p)>(k.size(1)), vrwkv::WkvState<float>::kFields, w,
                                 u, k, v);
    p.y = y.mutable_data_ptr<scalar_t>();
    p.y_residual = data_or_null<scalar_t>(y_residual);
    p.z = data_or_null<acc_type<scalar_t>>(z);
    Backend::run(p, causal);
  });
  return {y, y_residual, z};
}

template <typename Backend>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv_backward(const at::Tensor& gy, const at::Tensor& w,
                                                                           const at::Tensor& u, const at::Tensor& k,
                                                                           const at::Tensor& v, const at::Tensor& y,
                                                                           const at::Tensor& y_residual, const at::Tensor& z,
                                                                           bool causal) {
  check_wkv_inputs(w, u, k, v);
  check_wkv_saved(k, w, gy, y, y_residual, z);
  const at::Tensor gk = at::empty(k.sizes(), k.options());
  const at::Tensor gv = at::empty(k.sizes(), k.options());
  if (k.numel() == 0) return {at::zeros_like(w), at::zeros_like(u), gk, gv};
  at::Tensor gw, gu;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, k.scalar_type(), "bi_wkv_backward", [&] {
    using acc_t = acc_type<scalar_t>;
    WkvBackwardParams<scalar_t> p;
    const WkvWorkspace workspace(p, Backend::template chunk_length<decltype(p)>(k.size(1)), vrwkv::GradState<float>::kFields, w,
                                 u, k, v);
    gw = at::empty({p.batch * p.chunks, p.channels}, w.options());
    gu = at::empty_like(gw);
    p.gy = view<scalar_t>(gy);
    p.y = y.const_data_ptr<scalar_t>();
    p.y_residual = data_or_null<scalar_t>(y_residual);
    p.z = z.const_data_ptr<acc_t>();
    p.gk = gk.mutable_data_ptr<scalar_t>();
    p.gv = gv.mutable_data_ptr<scalar_t>();
    p.gw = gw.mutable_data_ptr<acc_t>();
    p.gu = gu.mutable_data_ptr<acc_t>();
    Backend::run(p, causal);
  });
  const auto [gw_sum, gu_sum] = Backend::sum_partials(gw, gu);
  return {gw_sum, gu_sum, gk, gv};
}

}  // namespace vrwkv_ops
