// Multi-scale deformable attention on the CPU: runs the kernels on threads.
#include <ATen/Parallel.h>

#include <vector>

#include "../common/cpu_dispatch.h"
#include "../operators.h"
#include "cpu_kernels.h"
#include "host.h"

namespace vrwkv_cpu {
namespace {

constexpr int64_t kGrain = 4096;  // a thread takes at least this many sampled values

struct CpuBackend {
  template <typename P>
  static void forward(const P& p) {
    const auto& kernels = cpu_kernels<DeformKernels<typename P::scalar_t>>();
    const int64_t samples = p.heads * p.levels * p.points * p.channels;
    at::parallel_for(0, p.batch * p.queries, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, samples)),
                     [&](int64_t begin, int64_t end) {
                       if constexpr (std::is_same_v<typename P::scalar_t, typename P::point_t>) {
                         kernels.forward(p, begin, end);
                       } else {
                         kernels.forward_wide(p, begin, end);
                       }
                     });
  }

  // A thread has all queries of an image and head, so that sums have one order. Half types are added in float32.
  template <typename P>
  static void backward(const P& p, const at::Tensor&) {
    using scalar_t = typename P::scalar_t;
    using acc_t = typename P::acc_t;
    const auto& kernels = cpu_kernels<DeformKernels<scalar_t>>();
    at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> sums, row(p.channels);
      for (int64_t i = begin; i < end; ++i) {
        if constexpr (!std::is_same_v<scalar_t, acc_t>) sums.assign(p.values * p.channels, acc_t(0));
        if constexpr (std::is_same_v<scalar_t, typename P::point_t>) {
          kernels.backward(p, i / p.heads, i % p.heads, sums.data(), row.data());
        } else {
          kernels.backward_wide(p, i / p.heads, i % p.heads, sums.data(), row.data());
        }
      }
    });
  }
};

}  // namespace

at::Tensor ms_deform_attn(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                          const at::Tensor& weights) {
  return vrwkv_ops::ms_deform_attn<CpuBackend>(value, shapes, locations, weights);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(const at::Tensor& grad, const at::Tensor& value,
                                                                       at::IntArrayRef shapes, const at::Tensor& locations,
                                                                       const at::Tensor& weights) {
  return vrwkv_ops::ms_deform_attn_backward<CpuBackend>(grad, value, shapes, locations, weights);
}

}  // namespace vrwkv_cpu
