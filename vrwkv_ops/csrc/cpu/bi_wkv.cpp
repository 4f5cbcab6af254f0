// Bi-WKV on the CPU: checks, memory, threads. The arithmetic is in ../state.h, the loops in kernels_impl.h.
#include "../ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <string>

#include "kernels.h"

namespace vrwkv_cpu {
namespace {

// One chunk where its scratch fits the cache; else chunks that also give threads something to share.
constexpr int64_t kChunk = 128;

// Tasks are handed out in groups of at least this many (token, channel) pairs.
constexpr int64_t kGrain = 8192;

template <typename scalar_t>
const Kernels<scalar_t>& kernels(bool causal) {
#if defined(__x86_64__) && defined(__GNUC__)
  // PyTorch's own choice, which ATEN_CPU_CAPABILITY overrides.
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512_kernels(scalar_t(), causal);
  if (capability == "AVX2") return avx2_kernels(scalar_t(), causal);
#endif
  return portable_kernels(scalar_t(), causal);
}

template <typename scalar_t>
View<scalar_t> view(const at::Tensor& x) {
  return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1), x.stride(2)};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename scalar_t>
Problem<scalar_t> make_problem(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v) {
  using acc_t = acc_type<scalar_t>;
  Problem<scalar_t> p;
  p.batch = k.size(0), p.tokens = k.size(1), p.channels = k.size(2);
  // From the sizes alone, never from the number of threads: results do not depend on that.
  p.chunk_length = p.tokens <= kMaxChunk ? p.tokens : kChunk;
  p.chunks = ceil_div(p.tokens, p.chunk_length);
  p.w = w.const_data_ptr<acc_t>(), p.u = u.const_data_ptr<acc_t>();
  p.k = view<scalar_t>(k), p.v = view<scalar_t>(v);
  p.decay = p.states = nullptr;
  return p;
}

// Runs body(b, chunk, c) for every image, chunk and block of channels.
template <typename Body>
void for_each_tile(int64_t batch, int64_t chunks, int64_t channels, int64_t length, const Body& body) {
  const int64_t blocks = ceil_div(channels, kLanes);
  const int64_t grain = std::max<int64_t>(1, kGrain / (kLanes * length));
  at::parallel_for(0, batch * chunks * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / blocks / chunks, i / blocks % chunks, i % blocks * kLanes);
  });
}

// Scans chunks on their own, joins their states, then writes the outputs of every chunk.
template <typename P, typename Table, typename States, typename Combine, typename Outputs>
void run(P& p, const at::TensorOptions& options, int fields, const Table& table, const States& scan, const Combine& combine,
         const Outputs& outputs) {
  using acc_t = typename P::acc_t;
  const at::Tensor decay = at::empty({kDecayColumns, p.chunk_length + 1, p.channels}, options);
  p.decay = decay.mutable_data_ptr<acc_t>();
  for_each_tile(1, 1, p.channels, p.chunk_length, [&](int64_t, int64_t, int64_t c) { table(p, c); });
  at::Tensor states;
  if (p.chunks > 1) {
    states = at::empty({2, fields, p.batch, p.chunks, p.channels}, options);
    p.states = states.mutable_data_ptr<acc_t>();
    for_each_tile(p.batch, p.chunks, p.channels, p.chunk_length,
                  [&](int64_t b, int64_t chunk, int64_t c) { scan(p, b, chunk, c); });
    for_each_tile(p.batch, 1, p.channels, p.chunks, [&](int64_t b, int64_t, int64_t c) { combine(p, b, c); });
  }
  for_each_tile(p.batch, p.chunks, p.channels, p.chunk_length,
                [&](int64_t b, int64_t chunk, int64_t c) { outputs(p, b, chunk, c); });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> bi_wkv_forward(const at::Tensor& w, const at::Tensor& u,
                                                              const at::Tensor& k, const at::Tensor& v, bool causal,
                                                              bool save) {
  vrwkv_ops::check_inputs(w, u, k, v);
  const bool half = k.element_size() == 2;
  at::Tensor y = at::empty(k.sizes(), k.options());
  at::Tensor y_residual = save && half ? at::empty(k.sizes(), k.options()) : at::empty({0}, k.options());
  at::Tensor z = save ? at::empty(k.sizes(), w.options()) : at::empty({0}, w.options());
  if (k.numel() == 0) return {y, y_residual, z};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, k.scalar_type(), "bi_wkv_forward", [&] {
    Forward<scalar_t> p{make_problem<scalar_t>(w, u, k, v), y.mutable_data_ptr<scalar_t>(),
                        save && half ? y_residual.mutable_data_ptr<scalar_t>() : nullptr,
                        save ? z.mutable_data_ptr<acc_type<scalar_t>>() : nullptr};
    const auto& kernel = kernels<scalar_t>(causal);
    run(p, w.options(), kForwardFields, kernel.decay, kernel.forward_states, kernel.forward_combine,
        kernel.forward_outputs);
  });
  return {y, y_residual, z};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv_backward(
    const at::Tensor& gy, const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& y, const at::Tensor& y_residual, const at::Tensor& z, bool causal) {
  vrwkv_ops::check_inputs(w, u, k, v);
  vrwkv_ops::check_saved(k, w, gy, y, y_residual, z);
  at::Tensor gk = at::empty(k.sizes(), k.options());
  at::Tensor gv = at::empty(k.sizes(), k.options());
  if (k.numel() == 0) return {at::zeros_like(w), at::zeros_like(u), gk, gv};
  at::Tensor gw, gu;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, k.scalar_type(), "bi_wkv_backward", [&] {
    using acc_t = acc_type<scalar_t>;
    auto problem = make_problem<scalar_t>(w, u, k, v);
    gw = at::empty({problem.batch * problem.chunks, problem.channels}, w.options());
    gu = at::empty_like(gw);
    Backward<scalar_t> p{problem,
                         view<scalar_t>(gy),
                         y.const_data_ptr<scalar_t>(),
                         y_residual.numel() ? y_residual.const_data_ptr<scalar_t>() : nullptr,
                         z.const_data_ptr<acc_t>(),
                         gk.mutable_data_ptr<scalar_t>(),
                         gv.mutable_data_ptr<scalar_t>(),
                         gw.mutable_data_ptr<acc_t>(),
                         gu.mutable_data_ptr<acc_t>()};
    const auto& kernel = kernels<scalar_t>(causal);
    run(p, w.options(), kBackwardFields, kernel.decay, kernel.backward_states, kernel.backward_combine,
        kernel.backward_outputs);
  });
  return {vrwkv_ops::sum_partials(gw), vrwkv_ops::sum_partials(gu), gk, gv};
}

}  // namespace vrwkv_cpu
