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
struct Channels {
  static constexpr int kCount = kLanes;
};

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

// Channels from c on of the pixels around a point: those outside the map have zeros.
template <typename P>
struct Pixels {
  using scalar_t = typename P::scalar_t;
  const scalar_t* at[4];

  VRWKV_FN Pixels(const P& p, const Corners<typename P::acc_t>& corners, int64_t image, int64_t head, int64_t c) {
    static const scalar_t zeros[kWide] = {};
    for (int n = 0; n < 4; ++n) {
      const int64_t s = corners.value[n];
      at[n] = s < 0 ? zeros : p.value + ((image * p.values + s) * p.heads + head) * p.channels + c;
    }
  }
};

template <typename P>
void deform_forward(const P& p, int64_t first_row, int64_t last_row) {
  using T = typename P::acc_t;
  using scalar_t = typename P::scalar_t;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t image = row / p.queries;
    for (int64_t head = 0; head < p.heads; ++head) {
      scalar_t* out = p.out + (row * p.heads + head) * p.channels;
      for_each_block(p.channels, [&](int64_t c, auto block) VRWKV_INLINE_LAMBDA {
        constexpr int kLanes = decltype(block)::kCount;
        Vector<T, kLanes> sum;
        for_each_point(p, row, head, [&](const Corners<T>& corners, T attention, int64_t, int64_t) VRWKV_INLINE_LAMBDA {
          const Pixels<P> pixels(p, corners, image, head, c);
          Vector<T, kLanes> v[4];
          T weight[4];
          for (int n = 0; n < 4; ++n) {
            load(v[n], pixels.at[n], 1, kLanes);
            weight[n] = attention * corners.weight[n];
          }
          for (int j = 0; j < kLanes; ++j)
            sum.x[j] += (weight[0] * v[0].x[j] + weight[1] * v[1].x[j]) + (weight[2] * v[2].x[j] + weight[3] * v[3].x[j]);
        });
        store(out + c, sum, kLanes);
      });
    }
  }
}

// Adds `factor` times a vector; to[0] is the first of kLanes neighbours.
template <typename T, int kLanes>
VRWKV_FN void add_scaled(T* to, T factor, const Vector<T, kLanes>& x) {
  for (int j = 0; j < kLanes; ++j) to[j] += factor * x.x[j];
}

template <typename P>
void deform_backward(const P& p, int64_t image, int64_t head, typename P::acc_t* sums) {
  using T = typename P::acc_t;
  using scalar_t = typename P::scalar_t;
  int64_t stride = p.channels;
  if constexpr (std::is_same_v<T, scalar_t>) {
    sums = p.gvalue + (image * p.values * p.heads + head) * p.channels;
    stride *= p.heads;
  }
  for (int64_t q = 0; q < p.queries; ++q) {
    const int64_t row = image * p.queries + q;
    const scalar_t* grad = p.grad + (row * p.heads + head) * p.channels;
    const auto point = [&](const Corners<T>& corners, T attention, int64_t level, int64_t i) VRWKV_INLINE_LAMBDA {
      Vector<T, kNarrow> lanes[4];
      T dot[4] = {};
      for_each_block(p.channels, [&](int64_t c, auto block) VRWKV_INLINE_LAMBDA {
        constexpr int kLanes = decltype(block)::kCount;
        const Pixels<P> pixels(p, corners, image, head, c);
        Vector<T, kLanes> g, v;
        load(g, grad + c, 1, kLanes);
        for (int n = 0; n < 4; ++n) {
          load(v, pixels.at[n], 1, kLanes);
          if constexpr (kLanes == 1) {
            dot[n] += g.x[0] * v.x[0];
          } else {
            for (int first = 0; first < kLanes; first += kNarrow)
              for (int j = 0; j < kNarrow; ++j) lanes[n].x[j] += g.x[first + j] * v.x[first + j];
          }
          if (corners.value[n] >= 0) add_scaled(sums + corners.value[n] * stride + c, attention * corners.weight[n], g);
        }
      });
      for (int n = 0; n < 4; ++n)
        for (int j = 0; j < kNarrow; ++j) dot[n] += lanes[n].x[j];
      T gweight, gx, gy;
      corners.gradients(p, level, attention, dot, gweight, gx, gy);
      p.gweights[i] = static_cast<typename P::point_t>(gweight);
      p.glocations[2 * i] = static_cast<typename P::point_t>(gx);
      p.glocations[2 * i + 1] = static_cast<typename P::point_t>(gy);
    };
    for_each_point(p, row, head, point);
  }
  if constexpr (!std::is_same_v<T, scalar_t>) {
    for (int64_t s = 0; s < p.values; ++s) {
      scalar_t* to = p.gvalue + ((image * p.values + s) * p.heads + head) * p.channels;
      for (int64_t c = 0; c < p.channels; ++c) to[c] = static_cast<scalar_t>(sums[s * p.channels + c]);
    }
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
