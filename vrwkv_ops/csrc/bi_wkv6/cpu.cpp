// bi_wkv6 on the CPU.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/where.h>

#include <algorithm>

#include "../common/cpu_dispatch.h"
#include "../common/tensor.h"
#include "../operators.h"
#include "cpu_kernels.h"

namespace vrwkv_cpu {
namespace {

using vrwkv_ops::ceil_div;
using vrwkv_ops::view;

template <typename Params>
void set_inputs(Params& p, const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& d,
                const at::Tensor& u, bool causal) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(p.d)>>;
  using scalar_t = std::remove_const_t<std::remove_pointer_t<decltype(p.r.data)>>;
  p.r = view<scalar_t>(r), p.k = view<scalar_t>(k), p.v = view<scalar_t>(v);
  p.d = d.const_data_ptr<T>(), p.u = u.const_data_ptr<T>();
  p.batch = r.size(0), p.tokens = r.size(1), p.heads = u.size(0), p.size = u.size(1), p.causal = causal;
}

at::Tensor decay(const at::Tensor& w) { return at::exp(-at::exp(w)).contiguous(); }

}  // namespace

at::Tensor bi_wkv6_forward(const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
                           const at::Tensor& u, bool causal) {
  at::Tensor y = at::empty(v.sizes(), v.options());
  if (y.numel() == 0) return y;
  const at::Tensor d = decay(w), bonus = u.contiguous();
  const int64_t columns = ceil_div(u.size(1), kWkv6Columns) * kWkv6Columns, heads = r.size(0) * u.size(0);
  // Few heads are cut into columns of values, which do not depend on each other.
  const int64_t wanted = ceil_div(2 * at::get_num_threads(), heads);
  const int64_t step = at::get_num_threads() == 1
                           ? columns
                           : ceil_div(columns / kWkv6Columns, std::min(wanted, columns / kWkv6Columns)) * kWkv6Columns;
  const int64_t pieces = ceil_div(columns, step);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "bi_wkv6_forward", [&] {
    Wkv6ForwardParams<scalar_t> p;
    set_inputs(p, r, k, v, d, bonus, causal);
    p.y = y.mutable_data_ptr<scalar_t>();
    const auto kernel = cpu_kernels<Wkv6Kernels<scalar_t>>().forward;
    at::parallel_for(0, heads * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / pieces, first = i % pieces * step;
        kernel(p, head / p.heads, head % p.heads, first, std::min(first + step, columns));
      }
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv6_backward(
    const at::Tensor& gy, const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
    const at::Tensor& u, bool causal) {
  const auto contiguous = at::MemoryFormat::Contiguous;
  at::Tensor gr = at::empty(r.sizes(), r.options(), contiguous), gk = at::empty(k.sizes(), k.options(), contiguous),
             gv = at::empty(v.sizes(), v.options(), contiguous), gd = at::empty(w.sizes(), w.options(), contiguous),
             gu = at::empty({r.size(0), u.size(0), u.size(1)}, u.options());
  if (r.numel() == 0) return {gr, gk, gv, at::zeros_like(gd), at::zeros_like(u)};
  const at::Tensor rate = at::exp(w), d = at::exp(-rate).contiguous(), bonus = u.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "bi_wkv6_backward", [&] {
    Wkv6BackwardParams<scalar_t> p;
    set_inputs(p, r, k, v, d, bonus, causal);
    p.gy = view<scalar_t>(gy);
    p.gr = gr.mutable_data_ptr<scalar_t>(), p.gk = gk.mutable_data_ptr<scalar_t>(), p.gv = gv.mutable_data_ptr<scalar_t>();
    p.gd = gd.mutable_data_ptr<vrwkv_ops::acc_type<scalar_t>>();
    p.gu = gu.mutable_data_ptr<vrwkv_ops::acc_type<scalar_t>>();
    const auto kernel = cpu_kernels<Wkv6Kernels<scalar_t>>().backward;
    at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernel(p, i / p.heads, i % p.heads);
    });
  });
  // dd/dw = -exp(w - exp(w)), at most 1/e; it is 0 where exp(w) is infinite.
  const at::Tensor slope = at::where(rate.isinf(), at::zeros_like(w), at::exp(w - rate));
  return {gr, gk, gv, gd.mul_(slope).neg_(), vrwkv_ops::sum_partials(gu)};
}

}  // namespace vrwkv_cpu
