// Multi-scale deformable attention on CUDA. Forward: a thread has 16 bytes of channels of a query and head, or one channel if
// rows are not aligned. Backward: one kernel for the points, with a thread for each, and one that adds up the values'
// gradients, with atomic additions or, for deterministic algorithms, with a thread that has all queries of its channel.
#include <ATen/Context.h>
#include <ATen/ops/zeros.h>

#include "../common/cuda_launch.h"
#include "../common/vector.h"
#include "../operators.h"
#include "host.h"

namespace vrwkv_cuda {
namespace {

using vrwkv::Vector;
using vrwkv_ops::Corners;

// The sampling point i, which belongs to row i / (H * L * P) of the queries of all images. Returns whether it sees its map.
template <typename P>
__device__ bool find(const P& p, int64_t i, int64_t& level, Corners<typename P::acc_t>& corners) {
  using T = typename P::acc_t;
  level = i / p.points % p.levels;
  return corners.find(p, level, static_cast<T>(p.locations[2 * i]), static_cast<T>(p.locations[2 * i + 1]));
}

// Index of the first channel of a value.
template <typename P>
__device__ int64_t value_at(const P& p, int64_t image, int64_t s, int64_t head) {
  return ((image * p.values + s) * p.heads + head) * p.channels;
}

template <int kLanes, typename P>
__global__ void __launch_bounds__(kBlockThreads) forward_kernel(const __grid_constant__ P p, int64_t items) {
  using T = typename P::acc_t;
  const int64_t packs = p.channels / kLanes, samples = p.levels * p.points;
  for (int64_t item = first_item(); item < items; item += item_stride()) {
    const int64_t c = item % packs * kLanes, place = item / packs;  // place: of the query and head
    const int64_t head = place % p.heads, image = place / p.heads / p.queries;
    Vector<T, kLanes> sum;
    for (int64_t i = place * samples; i < (place + 1) * samples; ++i) {
      int64_t level;
      Corners<T> corners;
      if (!find(p, i, level, corners)) continue;
      const T attention = static_cast<T>(p.weights[i]);
      for (int n = 0; n < 4; ++n) {
        if (corners.value[n] < 0) continue;
        Vector<T, kLanes> v;
        vrwkv::load(v, p.value + value_at(p, image, corners.value[n], head) + c, 1, kLanes);
        for (int j = 0; j < kLanes; ++j) sum.x[j] += attention * corners.weight[n] * v.x[j];
      }
    }
    vrwkv::store(p.out + place * p.channels + c, sum, kLanes);
  }
}

template <int kLanes, typename P>
__global__ void __launch_bounds__(kBlockThreads) points_kernel(const __grid_constant__ P p, int64_t items) {
  using T = typename P::acc_t;
  using point_t = typename P::point_t;
  for (int64_t i = first_item(); i < items; i += item_stride()) {
    int64_t level;
    Corners<T> corners;
    if (!find(p, i, level, corners)) continue;  // its gradients are zero
    const int64_t place = i / (p.levels * p.points), head = place % p.heads, image = place / p.heads / p.queries;
    T dot[4] = {};
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      Vector<T, kLanes> g, v;
      vrwkv::load(g, p.grad + place * p.channels + c, 1, kLanes);
      for (int n = 0; n < 4; ++n) {
        if (corners.value[n] < 0) continue;
        vrwkv::load(v, p.value + value_at(p, image, corners.value[n], head) + c, 1, kLanes);
        for (int j = 0; j < kLanes; ++j) dot[n] += g.x[j] * v.x[j];
      }
    }
    T gweight, gx, gy;
    corners.gradients(p, level, static_cast<T>(p.weights[i]), dot, gweight, gx, gy);
    p.gweights[i] = static_cast<point_t>(gweight);
    p.glocations[2 * i] = static_cast<point_t>(gx);
    p.glocations[2 * i + 1] = static_cast<point_t>(gy);
  }
}

// An item is a channel of a query and head, or with kInOrder a channel of an image and head.
template <bool kInOrder, typename P>
__global__ void __launch_bounds__(kBlockThreads)
    values_kernel(const __grid_constant__ P p, typename P::acc_t* sums, int64_t items) {
  using T = typename P::acc_t;
  const int64_t samples = p.levels * p.points, count = kInOrder ? p.queries : 1;
  for (int64_t item = first_item(); item < items; item += item_stride()) {
    const int64_t c = item % p.channels, head = item / p.channels % p.heads, rest = item / p.channels / p.heads;
    const int64_t first = kInOrder ? rest * p.queries : rest, image = first / p.queries;
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t place = row * p.heads + head;
      const T grad = static_cast<T>(p.grad[place * p.channels + c]);
      for (int64_t i = place * samples; i < (place + 1) * samples; ++i) {
        int64_t level;
        Corners<T> corners;
        if (!find(p, i, level, corners)) continue;
        const T attention = static_cast<T>(p.weights[i]);
        for (int n = 0; n < 4; ++n) {
          if (corners.value[n] < 0) continue;
          T* const to = sums + value_at(p, image, corners.value[n], head) + c;
          const T term = attention * corners.weight[n] * grad;
          if constexpr (kInOrder) {
            *to += term;
          } else {
            atomicAdd(to, term);
          }
        }
      }
    }
  }
}

// Calls body(std::integral_constant<int, n>) with the channels that a thread reads at once.
template <typename P, typename Body>
void dispatch_lanes(const P& p, std::initializer_list<const void*> tensors, const Body& body) {
  constexpr int kLanes = kPackLanes<typename P::scalar_t>;
  bool aligned = p.channels % kLanes == 0;
  for (const void* data : tensors) aligned = aligned && is_aligned(data);
  if (aligned) {
    body(std::integral_constant<int, kLanes>());
  } else {
    body(std::integral_constant<int, 1>());
  }
}

struct CudaBackend {
  template <typename P>
  static void forward(const P& p) {
    const auto stream = at::cuda::getCurrentCUDAStream();
    dispatch_lanes(p, {p.value, p.out}, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      const int64_t items = p.batch * p.queries * p.heads * (p.channels / kLanes);
      forward_kernel<kLanes><<<blocks_for(items), kBlockThreads, 0, stream>>>(p, items);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  template <typename P>
  static void backward(const P& p, const at::Tensor& gvalue) {
    using acc_t = typename P::acc_t;
    const auto stream = at::cuda::getCurrentCUDAStream();
    const int64_t points = p.batch * p.queries * p.heads * p.levels * p.points;
    if (points == 0) return;
    dispatch_lanes(p, {p.value, p.grad}, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      points_kernel<kLanes><<<blocks_for(points), kBlockThreads, 0, stream>>>(p, points);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    // Half types are added in float32.
    constexpr bool kIsHalf = !std::is_same_v<acc_t, typename P::scalar_t>;
    const at::Tensor sums = kIsHalf ? at::zeros(gvalue.sizes(), gvalue.options().dtype(at::kFloat)) : gvalue;
    acc_t* const to = sums.template mutable_data_ptr<acc_t>();
    if (at::globalContext().deterministicAlgorithms()) {
      const int64_t items = p.batch * p.heads * p.channels;
      values_kernel<true><<<blocks_for(items), kBlockThreads, 0, stream>>>(p, to, items);
    } else {
      const int64_t items = p.batch * p.queries * p.heads * p.channels;
      values_kernel<false><<<blocks_for(items), kBlockThreads, 0, stream>>>(p, to, items);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (kIsHalf) gvalue.copy_(sums);
  }
};

}  // namespace

at::Tensor ms_deform_attn(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                          const at::Tensor& weights) {
  const c10::cuda::CUDAGuard guard(value.device());
  return vrwkv_ops::ms_deform_attn<CudaBackend>(value, shapes, locations, weights);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(const at::Tensor& grad, const at::Tensor& value,
                                                                       at::IntArrayRef shapes, const at::Tensor& locations,
                                                                       const at::Tensor& weights) {
  const c10::cuda::CUDAGuard guard(value.device());
  return vrwkv_ops::ms_deform_attn_backward<CudaBackend>(grad, value, shapes, locations, weights);
}

}  // namespace vrwkv_cuda
