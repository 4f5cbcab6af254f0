// What the drivers of the CPU and the CUDA kernels and the kernels themselves (tile.h, shift.h, pointwise.h) agree on.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "platform.h"

namespace vrwkv_ops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// --- Bi-WKV ---

constexpr int kDecayColumns = 3;  // power, inverse, exponent

// The sequence is cut into chunks of `chunk_length` tokens (the last one may be shorter). `decay` holds, for each column of a
// row of decay powers and each n below decay_rows, C values; `states`, for each direction, state field, image and chunk,
// C values (null when there is a single chunk).
template <typename scalar_t>
struct Problem {
  using scalar_type = scalar_t;
  using acc_t = acc_type<scalar_t>;
  int64_t batch, tokens, channels;
  int64_t chunk_length, chunks, decay_rows;
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

// --- Token shifts ---

constexpr int kMaxMixes = 3;

// Channel group n ends before channel end[n]. Group 0 takes the token `step` to the left, then right, above and below
// (design: columns first); channels past the groups, group 4, stay.
struct Shift {
  int64_t height, width, step;
  int64_t end[4];

  VRWKV_FN int64_t tokens() const { return height * width; }
  VRWKV_FN int group(int64_t c) const { return (c >= end[0]) + (c >= end[1]) + (c >= end[2]) + (c >= end[3]); }
  // The token that token t takes from, or gives to if `reverse`; -1 outside the grid.
  VRWKV_FN int64_t neighbour(int64_t t, int group, bool reverse) const {
    if (group == 4) return t;
    const bool vertical = group >= 2;
    const int64_t by = (group % 2 == 0) == reverse ? step : -step;
    const int64_t place = (vertical ? t / width : t % width) + by;
    return place >= 0 && place < (vertical ? height : width) ? t + by * (vertical ? width : 1) : -1;
  }
};

template <typename scalar_t>
struct ShiftForward {
  using scalar_type = scalar_t;
  Shift shift;
  int64_t batch, channels;
  View<scalar_t> x;
  const acc_type<scalar_t>* mixes;  // (n, C)
  scalar_t* out[kMaxMixes];         // each (B, T, C), contiguous
};

// Rows, tokens of all images, are summed up in pieces of `piece_rows`.
template <typename scalar_t>
struct ShiftBackward {
  using scalar_type = scalar_t;
  Shift shift;
  int64_t batch, channels;
  int64_t piece_rows;
  View<scalar_t> x;
  const acc_type<scalar_t>* mixes;
  View<scalar_t> grads[kMaxMixes];
  scalar_t* gx;                // (B, T, C), contiguous
  acc_type<scalar_t>* gmixes;  // (pieces, n, C): summed by the driver, in order
};

// --- Element-wise functions ---

enum PointwiseFunction { kSquaredRelu, kSquaredReluBackward, kSigmoidGate, kSigmoidGateBackward, kPointwiseFunctions };

// Contiguous tensors of one size; as many as the function has.
template <typename scalar_t>
struct Pointwise {
  const scalar_t* in[3];
  scalar_t* out[2];
};

}  // namespace vrwkv_ops
