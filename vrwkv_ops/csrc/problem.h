// What the drivers of the CPU and the CUDA kernels and the kernels themselves (tile.h) agree on.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "platform.h"

namespace vrwkv_ops {

constexpr int kDecayColumns = 3;  // power, inverse, exponent

template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// A (B, T, C) tensor of any strides, read in place.
template <typename scalar_t>
struct View {
  const scalar_t* data;
  int64_t batch_stride, token_stride, channel_stride;

  VRWKV_FN const scalar_t* row(int64_t b, int64_t t, int64_t c) const {
    return data + b * batch_stride + t * token_stride + c * channel_stride;
  }
};

// The sequence is cut into chunks of `chunk_length` tokens (the last one may be shorter). `decay` holds, for each column of a
// row of decay powers and each n up to chunk_length, C values; `states`, for each direction, state field, image and chunk,
// C values (null when there is a single chunk).
template <typename scalar_t>
struct Problem {
  using scalar_type = scalar_t;
  using acc_t = acc_type<scalar_t>;
  int64_t batch, tokens, channels;
  int64_t chunk_length, chunks;
  acc_t headroom;  // values are multiplied by this power of two, so that sums over all tokens stay finite
  const acc_t* w;
  const acc_t* u;
  View<scalar_t> k, v;
  acc_t* decay;
  acc_t* states;
};

template <typename scalar_t>
struct Forward : Problem<scalar_t> {
  using acc_t = acc_type<scalar_t>;
  scalar_t* y;           // (B, T, C), contiguous, as are the two below
  scalar_t* y_residual;  // null unless wanted
  acc_t* z;              // null unless wanted
};

template <typename scalar_t>
struct Backward : Problem<scalar_t> {
  using acc_t = acc_type<scalar_t>;
  View<scalar_t> gy;
  const scalar_t* y;
  const scalar_t* y_residual;  // null for float and double
  const acc_t* z;
  scalar_t* gk;
  scalar_t* gv;
  acc_t* gw;  // (B, chunks, C): summed by the driver, in order
  acc_t* gu;
};

}  // namespace vrwkv_ops
