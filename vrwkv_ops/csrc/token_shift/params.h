// The parameters of the token shift kernels.
#pragma once

#include "../common/tensor_view.h"

namespace vrwkv_ops {

constexpr int kMaxMixes = 3, kGroups = 5;

// In each head of `head` channels, group n ends before channel end[n]. Groups 0 to 3 take the token `step` to the left, to the
// right, above and below (paper section 3.3). Group 4, the channels past the others, is not shifted.
struct ShiftGeometry {
  int64_t height, width, step;
  int64_t head;
  int64_t end[4];

  VRWKV_FN int64_t tokens() const { return height * width; }
  VRWKV_FN int group(int64_t c) const {
    const int64_t in_head = static_cast<uint32_t>(c) % static_cast<uint32_t>(head);  // 64 bits take many times longer on a GPU
    return (in_head >= end[0]) + (in_head >= end[1]) + (in_head >= end[2]) + (in_head >= end[3]);
  }
  // Returns the token that token t takes from, or that it gives to if `reverse`; -1 if that is outside the grid.
  VRWKV_FN int64_t neighbour(int64_t t, int group, bool reverse) const {
    return neighbour(t / width, t % width, group, reverse);
  }
  // The same for the token in a row and column of the grid.
  VRWKV_FN int64_t neighbour(int64_t row, int64_t column, int group, bool reverse) const {
    const int64_t t = row * width + column;
    if (group == 4) return t;
    const bool vertical = group >= 2;
    const int64_t by = (group % 2 == 0) == reverse ? step : -step;
    const int64_t place = (vertical ? row : column) + by;
    return place >= 0 && place < (vertical ? height : width) ? t + by * (vertical ? width : 1) : -1;
  }
  struct Neighbours {
    int64_t at[kGroups];
  };
  // Returns neighbour() of all groups.
  VRWKV_FN Neighbours neighbours(int64_t t, bool reverse) const {
    Neighbours result;
    for (int group = 0; group < kGroups; ++group) result.at[group] = neighbour(t, group, reverse);
    return result;
  }
};

template <typename scalar_t>
struct TokenShiftForwardParams {
  using scalar_type = scalar_t;
  ShiftGeometry geometry;
  int64_t batch, channels;
  View<scalar_t> x;
  const acc_type<scalar_t>* mixes;  // (n, C)
  scalar_t* out[kMaxMixes];         // each (B, T, C), contiguous
};

// The gradients of the mixes are summed over pieces of `piece_rows` rows (tokens of all images).
template <typename scalar_t>
struct TokenShiftBackwardParams {
  using scalar_type = scalar_t;
  ShiftGeometry geometry;
  int64_t batch, channels;
  int64_t piece_rows;
  View<scalar_t> x;
  const acc_type<scalar_t>* mixes;
  View<scalar_t> grads[kMaxMixes];
  scalar_t* gx;                // (B, T, C), contiguous
  acc_type<scalar_t>* gmixes;  // (pieces, n, C), summed by the caller in a fixed order
};

}  // namespace vrwkv_ops
