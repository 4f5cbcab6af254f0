// Bi-WKV on the CPU: runs the kernels on threads. The arithmetic is in state.h, the loops in chunk.h.
#include <ATen/Parallel.h>

#include <algorithm>

#include "../common/cpu_dispatch.h"
#include "../operators.h"
#include "cpu_kernels.h"
#include "host.h"

namespace vrwkv_cpu {

namespace {

using vrwkv_ops::ceil_div;

// Tokens of a chunk if one chunk is not enough: short, so that a long sequence keeps many threads busy.
constexpr int64_t kChunk = 128;

// A thread takes at least this many elements.
constexpr int64_t kGrain = 8192;

// Calls body(b, chunk, c) for every image, chunk and block of channels; a call costs as much as `tokens` tokens.
template <typename Body>
void for_each_tile(int64_t batch, int64_t chunks, int64_t channels, int64_t tokens, const Body& body) {
  const int64_t blocks = ceil_div(channels, kLanes);
  const int64_t grain = std::max<int64_t>(1, kGrain / (kLanes * tokens));
  at::parallel_for(0, batch * chunks * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / blocks / chunks, i / blocks % chunks, i % blocks * kLanes);
  });
}

// Scans each chunk on its own, joins the states of the chunks, and writes the outputs of each chunk.
template <typename P>
void run_steps(const P& p, const PassKernels<P>& steps) {
  if (p.chunks > 1) {
    for_each_tile(p.batch, p.chunks, p.channels, p.chunk_length,
                  [&](int64_t b, int64_t chunk, int64_t c) { steps.states(p, b, chunk, c); });
    for_each_tile(p.batch, 1, p.channels, p.chunks, [&](int64_t b, int64_t, int64_t c) { steps.combine(p, b, c); });
  }
  for_each_tile(p.batch, p.chunks, p.channels, p.chunk_length,
                [&](int64_t b, int64_t chunk, int64_t c) { steps.outputs(p, b, chunk, c); });
}

struct CpuBackend {
  static std::tuple<at::Tensor, at::Tensor> sum_partials(const at::Tensor& gw, const at::Tensor& gu) {
    return {vrwkv_ops::sum_partials(gw), vrwkv_ops::sum_partials(gu)};
  }

  template <typename P>
  static int64_t chunk_length(int64_t tokens) {
    return tokens <= kMaxChunk ? tokens : kChunk;
  }

  template <typename scalar_t>
  static void run(const WkvForwardParams<scalar_t>& p, bool causal) {
    run_steps(p, cpu_kernels<WkvKernels<scalar_t>>().forward[causal]);
  }
  template <typename scalar_t>
  static void run(const WkvBackwardParams<scalar_t>& p, bool causal) {
    run_steps(p, cpu_kernels<WkvKernels<scalar_t>>().backward[causal]);
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> bi_wkv_forward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                                                              const at::Tensor& v, bool causal, bool save) {
  return vrwkv_ops::bi_wkv_forward<CpuBackend>(w, u, k, v, causal, save);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv_backward(const at::Tensor& gy, const at::Tensor& w,
                                                                           const at::Tensor& u, const at::Tensor& k,
                                                                           const at::Tensor& v, const at::Tensor& y,
                                                                           const at::Tensor& y_residual, const at::Tensor& z,
                                                                           bool causal) {
  return vrwkv_ops::bi_wkv_backward<CpuBackend>(gy, w, u, k, v, y, y_residual, z, causal);
}

}  // namespace vrwkv_cpu
