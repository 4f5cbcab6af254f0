// Token shifts and the mix of every token with its shifted neighbour: what one block of channels of one token takes, forward
// and backward, for the CPU and CUDA alike. Results are x * mix + shift(x) * (1 - mix) for each mix.
#pragma once

#include "lanes.h"
#include "problem.h"
#include "state.h"

namespace {
namespace vrwkv {

using vrwkv_ops::acc_type;
using vrwkv_ops::Shift;
using vrwkv_ops::ShiftBackward;
using vrwkv_ops::ShiftForward;

// Channels c to c + count, at most kLanes and all of one group, of token t of image b. In dense tensors channels lie side by side.
template <int kMixes, int kLanes, bool dense, typename scalar_t>
VRWKV_FN void shift_forward(const ShiftForward<scalar_t>& p, int64_t b, int64_t t, int64_t from, int64_t c, int count) {
  using Block = LanesOf<acc_type<scalar_t>, kLanes>;
  Block own, moved, mix, out;
  load(own, p.x.row(b, t, c), dense ? 1 : p.x.channel_stride, count);
  if (from >= 0) load(moved, p.x.row(b, from, c), dense ? 1 : p.x.channel_stride, count);
  const int64_t offset = (b * p.shift.tokens() + t) * p.channels + c;
  for (int n = 0; n < kMixes; ++n) {
    load(mix, p.mixes + n * p.channels + c, 1, count);
    for (int j = 0; j < kLanes; ++j) out.x[j] = multiply_add(own.x[j], mix.x[j], moved.x[j] * (1 - mix.x[j]));
    store(p.out[n] + offset, out, count);
  }
}

// The gradient of x at a token, and what the token adds to those of the mixes. It takes from token `from`, gives to token `to`.
template <int kMixes, int kLanes, bool dense, typename scalar_t>
VRWKV_FN void shift_backward(const ShiftBackward<scalar_t>& p, int64_t b, int64_t t, int64_t from, int64_t to, int64_t c,
                             int count, LanesOf<acc_type<scalar_t>, kLanes> (&gmixes)[kMixes]) {
  using Block = LanesOf<acc_type<scalar_t>, kLanes>;
  Block own, moved, gx;
  load(own, p.x.row(b, t, c), dense ? 1 : p.x.channel_stride, count);
  if (from >= 0) load(moved, p.x.row(b, from, c), dense ? 1 : p.x.channel_stride, count);
  for (int n = 0; n < kMixes; ++n) {
    Block mix, here, there;
    const auto& grad = p.grads[n];
    load(mix, p.mixes + n * p.channels + c, 1, count);
    load(here, grad.row(b, t, c), dense ? 1 : grad.channel_stride, count);
    if (to >= 0) load(there, grad.row(b, to, c), dense ? 1 : grad.channel_stride, count);
    for (int j = 0; j < kLanes; ++j) {
      gx.x[j] = multiply_add(here.x[j], mix.x[j], multiply_add(there.x[j], 1 - mix.x[j], gx.x[j]));
      gmixes[n].x[j] = multiply_add(here.x[j], own.x[j] - moved.x[j], gmixes[n].x[j]);
    }
  }
  store(p.gx + (b * p.shift.tokens() + t) * p.channels + c, gx, count);
}

}  // namespace vrwkv
}  // namespace
