// The parameters of the Bi-WKV kernels.
#pragma once

#include "../common/tensor_view.h"

namespace vrwkv_ops {

// The sequence is split into chunks of `chunk_length` tokens; the last one may be shorter. `states` has the shape (directions,
// state fields, B, chunks, C) and is null if there is a single chunk.
template <typename scalar_t>
struct WkvParams {
  using scalar_type = scalar_t;
  using acc_t = acc_type<scalar_t>;
  int64_t batch, tokens, channels;
  int64_t chunk_length, chunks;
  acc_t headroom;  // values are multiplied by this power of two, so that sums over all tokens stay finite
  const acc_t* w;
  const acc_t* u;
  View<scalar_t> k, v;
  acc_t* states;
};

template <typename scalar_t>
struct WkvForwardParams : WkvParams<scalar_t> {
  using acc_t = acc_type<scalar_t>;
  scalar_t* y;           // (B, T, C), contiguous, as are the two below
  scalar_t* y_residual;  // y minus its rounding; null unless saved
  acc_t* z;              // log of the denominator; null unless saved
};

template <typename scalar_t>
struct WkvBackwardParams : WkvParams<scalar_t> {
  using acc_t = acc_type<scalar_t>;
  View<scalar_t> gy;
  const scalar_t* y;
  const scalar_t* y_residual;  // null for float and double
  const acc_t* z;
  scalar_t* gk;
  scalar_t* gv;
  acc_t* gw;  // (B, chunks, C), summed by the caller in a fixed order
  acc_t* gu;
};

}  // namespace vrwkv_ops
