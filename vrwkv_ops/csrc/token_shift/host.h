// Checks, allocations and dispatch over dtypes of the token shifts, for a Backend that has
//   template <int kMixes, typename scalar_t> static void run(const TokenShiftForwardParams<scalar_t>&);
//   template <int kMixes, typename scalar_t> static void run(const TokenShiftBackwardParams<scalar_t>&, int64_t pieces);
#pragma once

#include <c10/util/string_view.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/tensor.h"
#include "params.h"

namespace vrwkv_ops {

inline ShiftGeometry make_geometry(const at::Tensor& x, int64_t height, int64_t width, int64_t shift_pixel,
                                   double channel_gamma, c10::string_view mode, int64_t heads) {
  // The quotient first: the product may overflow.
  TORCH_CHECK(
      x.dim() == 3 && height >= 0 && width >= 0 && (height == 0 || x.size(1) / height == width) && x.size(1) == height * width,
      "token shift: expected x of shape (B, height * width, C) with a grid of ", height, " x ", width, ", got ", x.sizes());
  TORCH_CHECK(shift_pixel >= 0, "token shift: expected shift_pixel >= 0, got ", shift_pixel);
  TORCH_CHECK(channel_gamma > 0 && channel_gamma <= 0.25, "token shift: expected channel_gamma in (0, 1/4], got ",
              channel_gamma);
  TORCH_CHECK(heads >= 1 && x.size(2) % heads == 0, "token shift: expected heads that divide the ", x.size(2),
              " channels, got ", heads);
  const int64_t channels = x.size(2) / heads;
  // All steps beyond the grid give the same result, and small ones cannot overflow.
  ShiftGeometry geometry{height, width, std::min(shift_pixel, std::max(height, width)), channels, {}};
  for (int n = 0; n < 4; ++n) geometry.end[n] = static_cast<int64_t>(std::floor(channels * channel_gamma * (n + 1)));
  if (mode == "single_shift") {
    std::fill_n(geometry.end, 4, channels);
  } else if (mode == "double_shift") {
    geometry.end[2] = geometry.end[3] = geometry.end[1];
  } else {
    TORCH_CHECK(mode == "q_shift", "token shift: expected mode q_shift, single_shift or double_shift, got ", mode);
  }
  TORCH_CHECK(mode == "q_shift" || height == 1, "token shift: expected a grid of one row for mode ", mode, ", got ", height);
  return geometry;
}

inline void check_mixes(const at::Tensor& x, const at::Tensor& mixes) {
  const auto accumulation = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(mixes.dim() == 2 && mixes.size(0) >= 1 && mixes.size(0) <= kMaxMixes && mixes.size(1) == x.size(2) &&
                  mixes.is_contiguous() && mixes.scalar_type() == accumulation && mixes.device() == x.device(),
              "token_shift: expected mixes contiguous, of shape (1 to ", kMaxMixes, ", ", x.size(2), ") and type ",
              accumulation, " on ", x.device(), ", got ", mixes.sizes(), " ", mixes.scalar_type(), " on ", mixes.device());
}

// Calls body(std::integral_constant<int, n>) for n mixes.
template <typename Body>
void dispatch_mixes(int64_t n, const Body& body) {
  if (n == 1) {
    body(std::integral_constant<int, 1>());
  } else if (n == 2) {
    body(std::integral_constant<int, 2>());
  } else {
    body(std::integral_constant<int, 3>());
  }
}

template <typename Backend>
std::vector<at::Tensor> token_shift(const at::Tensor& x, const at::Tensor& mixes, const ShiftGeometry& geometry) {
  check_mixes(x, mixes);
  std::vector<at::Tensor> out(mixes.size(0));
  for (auto& y : out) y = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "token_shift", [&] {
    TokenShiftForwardParams<scalar_t> p;
    p.geometry = geometry, p.batch = x.size(0), p.channels = x.size(2);
    p.x = view<scalar_t>(x);
    p.mixes = mixes.const_data_ptr<acc_type<scalar_t>>();
    for (size_t n = 0; n < out.size(); ++n) p.out[n] = out[n].mutable_data_ptr<scalar_t>();
    dispatch_mixes(mixes.size(0), [&](auto n) { Backend::template run<decltype(n)::value>(p); });
  });
  return out;
}

template <typename Backend>
std::tuple<at::Tensor, at::Tensor> token_shift_backward(at::TensorList grads, const at::Tensor& x, const at::Tensor& mixes,
                                                        const ShiftGeometry& geometry) {
  check_mixes(x, mixes);
  TORCH_CHECK(static_cast<int64_t>(grads.size()) == mixes.size(0), "token_shift_backward: expected ", mixes.size(0),
              " gradients, got ", grads.size());
  for (const at::Tensor& grad : grads)
    TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
                "token_shift_backward: expected gradients like x (", x.sizes(), " ", x.scalar_type(), "), got ", grad.sizes(),
                " ", grad.scalar_type());
  const at::Tensor gx = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return {gx, at::zeros_like(mixes)};
  // Pieces depend on sizes only, so that results do.
  constexpr int64_t kPieceRows = 64, kMaxPieces = 1024;
  const int64_t rows = x.size(0) * x.size(1);
  const int64_t piece_rows = std::max(kPieceRows, ceil_div(rows, kMaxPieces)), pieces = ceil_div(rows, piece_rows);
  const at::Tensor gmixes = at::empty({pieces, mixes.size(0), x.size(2)}, mixes.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "token_shift_backward", [&] {
    TokenShiftBackwardParams<scalar_t> p;
    p.geometry = geometry, p.batch = x.size(0), p.channels = x.size(2), p.piece_rows = piece_rows;
    p.x = view<scalar_t>(x);
    p.mixes = mixes.const_data_ptr<acc_type<scalar_t>>();
    for (size_t n = 0; n < grads.size(); ++n) p.grads[n] = view<scalar_t>(grads[n]);
    p.gx = gx.mutable_data_ptr<scalar_t>();
    p.gmixes = gmixes.mutable_data_ptr<acc_type<scalar_t>>();
    dispatch_mixes(mixes.size(0), [&](auto n) { Backend::template run<decltype(n)::value>(p, pieces); });
  });
  return {gx, sum_partials(gmixes)};
}

}  // namespace vrwkv_ops
