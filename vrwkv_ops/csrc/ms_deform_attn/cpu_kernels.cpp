// Multi-scale deformable attention for one CPU instruction set: the build compiles this file once for each
// (common/cpu_isa.h).
#include "cpu_kernels.h"

#include "../common/cpu_isa_begin.h"
#include "../common/vector.h"

namespace {
namespace vrwkv {

using vrwkv_ops::acc_type;
using vrwkv_ops::Corners;
using vrwkv_ops::DeformParams;

constexpr int kWide = 32, kNarrow = 8;  // channels that are computed at once
template <int kLanes>
using Channels = std::integral_constant<int, kLanes>;

// Calls body(c, Channels<n>) for all channels, n at a time.
template <typename Body>
VRWKV_FN void for_each_block(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kWide <= channels; c += kWide) body(c, Channels<kWide>());
  for (; c + kNarrow <= channels; c += kNarrow) body(c, Channels<kNarrow>());
  for (; c < channels; ++c) body(c, Channels<1>());
}

// Calls body(corners, attention weight, level, index of the point) for all points of a query and head inside their maps.
template <typename P, typename Body>
VRWKV_FN void for_each_point(const P& p, int64_t row, int64_t head, const Body& body) {
  using T = typename P::acc_t;
  int64_t i = (row * p.heads + head) * p.levels * p.points;
  Corners<T> corners;
  for (int64_t level = 0; level < p.levels; ++level) {
    for (int64_t n = 0; n < p.points; ++n, ++i) {
      const T x = static_cast<T>(p.locations[2 * i]), y = static_cast<T>(p.locations[2 * i + 1]);
      if (corners.find(p, level, x, y)) body(corners, static_cast<T>(p.weights[i]), level, i);
    }
  }
}

// The pixels around a point: those outside the map have zeros. `base` is the first value, of one head.
template <typename T, typename scalar_t>
VRWKV_FN void find_pixels(const scalar_t* (&at)[4], const Corners<T>& corners, const scalar_t* base, int64_t stride) {
  static const scalar_t zeros[kWide] = {};
  for (int n = 0; n < 4; ++n) at[n] = corners.value[n] < 0 ? zeros : base + corners.value[n] * stride;
}

template <typename P>
void deform_forward(const P& p, int64_t first_row, int64_t last_row) {
  using T = typename P::acc_t;
  using scalar_t = typename P::scalar_t;
  const int64_t stride = p.heads * p.channels;
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const scalar_t* const value = p.value + row / p.queries * p.values * stride + head * p.channels;
      scalar_t* out = p.out + (row * p.heads + head) * p.channels;
      for_each_block(p.channels, [&](int64_t c, auto block) VRWKV_INLINE_LAMBDA {
        constexpr int kLanes = decltype(block)::value;
        Vector<T, kLanes> sum;
        for_each_point(p, row, head, [&](const Corners<T>& corners, T attention, int64_t, int64_t) VRWKV_INLINE_LAMBDA {
          const scalar_t* at[4];
          find_pixels(at, corners, value + c, stride);
          Vector<T, kLanes> v[4];
          for (int n = 0; n < 4; ++n) load(v[n], at[n], 1, kLanes);
          const T w0 = attention * corners.weight[0], w1 = attention * corners.weight[1];
          const T w2 = attention * corners.weight[2], w3 = attention * corners.weight[3];
          for (int j = 0; j < kLanes; ++j) sum.x[j] += (w0 * v[0].x[j] + w1 * v[1].x[j]) + (w2 * v[2].x[j] + w3 * v[3].x[j]);
        });
        store(out + c, sum, kLanes);
      });
    }
  }
}

// Adds `factor` times x to the sums of a pixel, and to `lanes` the products of x and the pixel.
template <int kLanes, typename T, typename scalar_t>
VRWKV_FN void visit_pixel(T* __restrict__ sums, const T* __restrict__ x, const scalar_t* __restrict__ pixel, T factor,
                          T (&lanes)[kNarrow]) {
  constexpr int kStep = kLanes < kNarrow ? 1 : kNarrow;
  Vector<T, kLanes> value;
  load(value, pixel, 1, kLanes);
  for (int first = 0; first < kLanes; first += kStep)
    for (int j = 0; j < kStep; ++j) lanes[j] += x[first + j] * value.x[first + j];
  for (int j = 0; j < kLanes; ++j) sums[j] += factor * x[j];
}

template <typename P>
void deform_backward(const P& p, int64_t image, int64_t head, typename P::acc_t* sums, typename P::acc_t* row_grad) {
  using T = typename P::acc_t;
  using scalar_t = typename P::scalar_t;
  constexpr bool kIsHalf = !std::is_same_v<T, scalar_t>;
  const int64_t stride = p.heads * p.channels, sums_stride = kIsHalf ? p.channels : stride;
  const int64_t start = image * p.values * stride + head * p.channels;
  if constexpr (!kIsHalf) sums = p.gvalue + start;
  for (int64_t q = 0; q < p.queries; ++q) {
    const int64_t row = image * p.queries + q;
    for (int64_t c = 0; c < p.channels; ++c) row_grad[c] = cast<T>(p.grad[(row * p.heads + head) * p.channels + c]);
    const auto point = [&](const Corners<T>& corners, T attention, int64_t level, int64_t i) VRWKV_INLINE_LAMBDA {
      T dot[4] = {};
      for (int n = 0; n < 4; ++n) {
        const int64_t s = corners.value[n];
        if (s < 0) continue;
        const T factor = attention * corners.weight[n];
        T lanes[kNarrow] = {};
        for_each_block(p.channels, [&](int64_t c, auto block) VRWKV_INLINE_LAMBDA {
          visit_pixel<decltype(block)::value>(sums + s * sums_stride + c, row_grad + c, p.value + start + s * stride + c,
                                              factor, lanes);
        });
        for (int j = 0; j < kNarrow; ++j) dot[n] += lanes[j];
      }
      T gweight, gx, gy;
      corners.gradients(p, level, attention, dot, gweight, gx, gy);
      p.gweights[i] = static_cast<typename P::point_t>(gweight);
      p.glocations[2 * i] = static_cast<typename P::point_t>(gx);
      p.glocations[2 * i + 1] = static_cast<typename P::point_t>(gy);
    };
    for_each_point(p, row, head, point);
  }
  if constexpr (kIsHalf) {
    for (int64_t s = 0; s < p.values; ++s)
      for (int64_t c = 0; c < p.channels; ++c) p.gvalue[start + s * stride + c] = cast<scalar_t>(sums[s * p.channels + c]);
  }
}

template <typename scalar_t>
constexpr vrwkv_cpu::DeformKernels<scalar_t> make_table() {
  using Narrow = DeformParams<scalar_t, scalar_t>;
  using Wide = DeformParams<scalar_t, acc_type<scalar_t>>;
  return {deform_forward<Narrow>, deform_forward<Wide>, deform_backward<Narrow>, deform_backward<Wide>};
}

}  // namespace vrwkv
}  // namespace

VRWKV_DEFINE_CPU_KERNELS(vrwkv_cpu::DeformKernels)

#include "../common/cpu_isa_end.h"
