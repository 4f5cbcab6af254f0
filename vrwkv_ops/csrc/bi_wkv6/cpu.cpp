// bi_wkv6 on the CPU.
#include <ATen/Parallel.h>

#include <algorithm>

#include "../common/cpu_dispatch.h"
#include "../operators.h"
#include "cpu_kernels.h"
#include "host.h"

namespace vrwkv_cpu {
namespace {

using vrwkv_ops::ceil_div;
using vrwkv_ops::view;

template <typename Params>
void set_inputs(Params& p, const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
                const at::Tensor& u, bool causal) {
  using T = typename Params::T;
  using scalar_t = std::remove_const_t<std::remove_pointer_t<decltype(p.r.data)>>;
  p.r = view<scalar_t>(r), p.k = view<scalar_t>(k), p.v = view<scalar_t>(v), p.w = view<T>(w);
  p.u = u.const_data_ptr<T>();
  p.batch = r.size(0), p.tokens = r.size(1), p.heads = u.size(0), p.size = u.size(1), p.causal = causal;
}

}  // namespace

at::Tensor bi_wkv6_forward(const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
                           const at::Tensor& u, bool causal) {
  vrwkv_ops::check_wkv6_inputs(r, k, v, w, u);
  const at::Tensor y = at::empty(v.sizes(), v.options()), bonus = u.contiguous();
  if (y.numel() == 0) return y;
  const int64_t columns = ceil_div(u.size(1), kWkv6Columns) * kWkv6Columns, heads = r.size(0) * u.size(0);
  // All threads take as many whole heads. Those that are left are cut into columns of values, which do not depend on each other.
  const int64_t threads = at::get_num_threads(), whole = heads / threads * threads;
  const int64_t rest = heads - whole, units = columns / kWkv6Columns;
  const int64_t step = ceil_div(units, std::min(threads / std::max<int64_t>(rest, 1), units)) * kWkv6Columns;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "bi_wkv6_forward", [&] {
    Wkv6ForwardParams<scalar_t> p;
    set_inputs(p, r, k, v, w, bonus, causal);
    p.y = y.mutable_data_ptr<scalar_t>();
    const auto kernel = cpu_kernels<Wkv6Kernels<scalar_t>>().forward;
    const auto run = [&](int64_t first_head, int64_t count, int64_t step) {
      const int64_t pieces = ceil_div(columns, step);
      at::parallel_for(0, count * pieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t head = first_head + i / pieces, first = i % pieces * step;
          kernel(p, head / p.heads, head % p.heads, first, std::min(first + step, columns));
        }
      });
    };
    run(0, whole, columns);
    run(whole, rest, step);
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv6_backward(
    const at::Tensor& gy, const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
    const at::Tensor& u, bool causal) {
  const vrwkv_ops::Wkv6Gradients grads(gy, r, k, v, w, u);
  if (v.numel() == 0) return grads.sum();
  const at::Tensor bonus = u.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "bi_wkv6_backward", [&] {
    using T = vrwkv_ops::acc_type<scalar_t>;
    Wkv6BackwardParams<scalar_t> p;
    set_inputs(p, r, k, v, w, bonus, causal);
    p.gy = view<scalar_t>(gy);
    p.gr = grads.r.mutable_data_ptr<scalar_t>(), p.gk = grads.k.mutable_data_ptr<scalar_t>();
    p.gv = grads.v.mutable_data_ptr<scalar_t>();
    p.gw = grads.w.mutable_data_ptr<T>(), p.gu = grads.u.mutable_data_ptr<T>();
    const auto kernel = cpu_kernels<Wkv6Kernels<scalar_t>>().backward;
    at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernel(p, i / p.heads, i % p.heads);
    });
  });
  return grads.sum();
}

}  // namespace vrwkv_cpu
