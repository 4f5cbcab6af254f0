// Token shifts and the mix of every token with its shifted neighbour, forward and backward, for kLanes neighbouring channels of
// one token, on the CPU and CUDA. Results are x * mix + shift(x) * (1 - mix) for each mix.
#pragma once

#include "../common/scaled.h"
#include "../common/vector.h"
#include "params.h"

namespace {
namespace vrwkv {

using vrwkv_ops::acc_type;
using vrwkv_ops::ShiftGeometry;
using vrwkv_ops::TokenShiftBackwardParams;
using vrwkv_ops::TokenShiftForwardParams;

// Calls body(group, first, last) for the channels of each group in each head, in ascending order.
template <typename Body>
VRWKV_FN void for_each_group(const ShiftGeometry& geometry, int64_t channels, const Body& body) {
  int64_t first = 0;
  for (int64_t start = 0; start < channels; start += geometry.head) {
    for (int group = 0; group < vrwkv_ops::kGroups; ++group) {
      const int64_t last = start + (group < vrwkv_ops::kGroups - 1 ? geometry.end[group] : geometry.head);
      body(group, first, last);
      first = last;
    }
  }
}

// Loads a block of a token, or zeros for a negative token. The CPU loads zeros, too: with a branch g++ makes scalar code.
template <typename T, int kLanes, typename scalar_t>
VRWKV_FN void load_token(Vector<T, kLanes>& to, const vrwkv_ops::View<scalar_t>& from, int64_t b, int64_t t, int64_t c) {
#if defined(__CUDA_ARCH__)
  if (t >= 0) load(to, from.row(b, t, c), 1, kLanes);
#else
  alignas(64) static constexpr scalar_t zeros[kLanes] = {};
  load(to, t >= 0 ? from.row(b, t, c) : zeros, 1, kLanes);
#endif
}

// Computes channels c to c + kLanes of token t of image b, which lie in one group and side by side. The group takes token
// `from`, or zeros if that is negative.
template <int kMixes, int kLanes, typename scalar_t>
VRWKV_FN void shift_forward(const TokenShiftForwardParams<scalar_t>& p, int64_t b, int64_t t, int64_t from, int64_t c) {
  using Block = Vector<acc_type<scalar_t>, kLanes>;
  Block own, moved, mix, out;
  load(own, p.x.row(b, t, c), 1, kLanes);
  load_token(moved, p.x, b, from, c);
  const int64_t offset = (b * p.geometry.tokens() + t) * p.channels + c;
  for (int n = 0; n < kMixes; ++n) {
    load(mix, p.mixes + n * p.channels + c, 1, kLanes);
    VRWKV_LANE_LOOP
    for (int j = 0; j < kLanes; ++j) out.x[j] = multiply_add(own.x[j], mix.x[j], moved.x[j] * (1 - mix.x[j]));
    store(p.out[n] + offset, out, kLanes);
  }
}

// Computes the gradient of x at a token and adds the token's part to the gradients of the mixes. The token takes from token
// `from` and gives to token `to`.
template <int kMixes, int kLanes, typename scalar_t>
VRWKV_FN void shift_backward(const TokenShiftBackwardParams<scalar_t>& p, int64_t b, int64_t t, int64_t from, int64_t to,
                             int64_t c, Vector<acc_type<scalar_t>, kLanes> (&gmixes)[kMixes]) {
  using Block = Vector<acc_type<scalar_t>, kLanes>;
  Block own, moved, gx;
  load(own, p.x.row(b, t, c), 1, kLanes);
  load_token(moved, p.x, b, from, c);
  for (int n = 0; n < kMixes; ++n) {
    Block mix, here, there;
    const auto& grad = p.grads[n];
    load(mix, p.mixes + n * p.channels + c, 1, kLanes);
    load(here, grad.row(b, t, c), 1, kLanes);
    load_token(there, grad, b, to, c);
    for (int j = 0; j < kLanes; ++j) {
      gx.x[j] = multiply_add(here.x[j], mix.x[j], multiply_add(there.x[j], 1 - mix.x[j], gx.x[j]));
      gmixes[n].x[j] = multiply_add(here.x[j], own.x[j] - moved.x[j], gmixes[n].x[j]);
    }
  }
  store(p.gx + (b * p.geometry.tokens() + t) * p.channels + c, gx, kLanes);
}

}  // namespace vrwkv
}  // namespace
