// The parameters of the kernels of multi-scale deformable attention, and the arithmetic of a sampling point.
#pragma once

#include <cmath>

#include "../common/tensor_view.h"

namespace vrwkv_ops {

constexpr int kMaxLevels = 16;

// All tensors are contiguous. Points and weights have the dtype point_t: scalar_t, or the type of accumulation.
template <typename value_t, typename point_type>
struct DeformParams {
  using scalar_t = value_t;
  using point_t = point_type;
  using acc_t = acc_type<scalar_t>;

  int64_t batch, values, heads, channels, queries, levels, points;  // B, S, H, D, Q, L, P
  int64_t height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
  const scalar_t* value;     // (B, S, H, D)
  const point_t* locations;  // (B, Q, H, L, P, 2): x and y as fractions of the map
  const point_t* weights;    // (B, Q, H, L, P)
  scalar_t* out;             // (B, Q, H, D), of the forward pass

  // Of the backward pass.
  const scalar_t* grad;  // (B, Q, H, D)
  scalar_t* gvalue;      // (B, S, H, D)
  point_t* glocations;
  point_t* gweights;
};

// The four pixels around a sampling point, in the order of rows, and the weights of a bilinear interpolation. Pixels have
// their centres at (n + 0.5) / size, and outside the map all is zero.
template <typename T>
struct Corners {
  int64_t value[4];  // index of the value, or -1 outside the map
  T weight[4];
  T right, down;  // the point's distance from the upper left pixel

  // Returns whether any pixel is inside the map.
  template <typename P>
  VRWKV_FN bool find(const P& p, int64_t level, T x, T y) {
    const int64_t height = p.height[level], width = p.width[level];
    // The steps of PyTorch's grid_sample. New models sample the centres of pixels, where a rounding decides which of two
    // neighbours the gradient of the location sees.
    x = (T(2) * x - T(1) + T(1)) * (static_cast<T>(width) / T(2)) - T(0.5);
    y = (T(2) * y - T(1) + T(1)) * (static_cast<T>(height) / T(2)) - T(0.5);
    if (!(x >= T(-1) && y >= T(-1) && x < static_cast<T>(width) && y < static_cast<T>(height))) return false;  // NaN too
    const T first_x = std::floor(x), first_y = std::floor(y);
    const int64_t column = static_cast<int64_t>(first_x), row = static_cast<int64_t>(first_y);
    right = x - first_x, down = y - first_y;
    const T left = T(1) - right, up = T(1) - down;
    weight[0] = up * left, weight[1] = up * right, weight[2] = down * left, weight[3] = down * right;
    const int64_t first = p.start[level] + row * width + column;
    const bool has_left = column >= 0, has_right = column + 1 < width, has_up = row >= 0, has_down = row + 1 < height;
    value[0] = has_up && has_left ? first : -1;
    value[1] = has_up && has_right ? first + 1 : -1;
    value[2] = has_down && has_left ? first + width : -1;
    value[3] = has_down && has_right ? first + width + 1 : -1;
    return true;
  }

  // Gradients of the weight and of the location from `dot`, the products of the output's gradient with the four pixels.
  template <typename P>
  VRWKV_FN void gradients(const P& p, int64_t level, T attention, const T (&dot)[4], T& gweight, T& gx, T& gy) const {
    const T left = T(1) - right, up = T(1) - down;
    gweight = weight[0] * dot[0] + weight[1] * dot[1] + (weight[2] * dot[2] + weight[3] * dot[3]);
    gx = attention * static_cast<T>(p.width[level]) * (up * (dot[1] - dot[0]) + down * (dot[3] - dot[2]));
    gy = attention * static_cast<T>(p.height[level]) * (left * (dot[2] - dot[0]) + right * (dot[3] - dot[1]));
  }
};

}  // namespace vrwkv_ops
