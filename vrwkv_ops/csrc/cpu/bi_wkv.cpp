// Bi-WKV on the CPU: which kernels, and their threads. The arithmetic is in ../state.h, the loops in ../tile.h.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <string>

#include "../driver.h"
#include "kernels.h"

namespace vrwkv_cpu {

Capability capability() {
  static const std::string name = at::get_cpu_capability();
  static const Capability found =
      name == "AVX512" ? Capability::kAvx512 : (name == "AVX2" ? Capability::kAvx2 : Capability::kPortable);
  return found;
}

namespace {

using vrwkv_ops::ceil_div;

// The length of chunks where one does not do: short enough that a long sequence keeps many threads busy.
constexpr int64_t kChunk = 128;

// A thread gets at least this many pairs of a token and a channel.
constexpr int64_t kGrain = 8192;

// Runs body(b, chunk, c) for every image, chunk and block of channels, each worth `tokens` tokens.
template <typename Body>
void for_each_tile(int64_t batch, int64_t chunks, int64_t channels, int64_t tokens, const Body& body) {
  const int64_t blocks = ceil_div(channels, kLanes);
  const int64_t grain = std::max<int64_t>(1, kGrain / (kLanes * tokens));
  at::parallel_for(0, batch * chunks * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / blocks / chunks, i / blocks % chunks, i % blocks * kLanes);
  });
}

// Scans chunks on their own, joins their states, then writes the outputs of every chunk.
template <typename P>
void run_steps(const P& p, const Steps<P>& steps, void (*decay)(const Problem<typename P::scalar_type>&, int64_t)) {
  for_each_tile(1, 1, p.channels, p.chunk_length, [&](int64_t, int64_t, int64_t c) { decay(p, c); });
  if (p.chunks > 1) {
    for_each_tile(p.batch, p.chunks, p.channels, p.chunk_length,
                  [&](int64_t b, int64_t chunk, int64_t c) { steps.states(p, b, chunk, c); });
    for_each_tile(p.batch, 1, p.channels, p.chunks, [&](int64_t b, int64_t, int64_t c) { steps.combine(p, b, c); });
  }
  for_each_tile(p.batch, p.chunks, p.channels, p.chunk_length,
                [&](int64_t b, int64_t chunk, int64_t c) { steps.outputs(p, b, chunk, c); });
}

struct Cpu {
  template <typename P>
  static vrwkv_ops::Chunking chunking(int64_t tokens) {
    const int64_t length = tokens <= kMaxChunk ? tokens : kChunk;
    return {length, length + 1};
  }

  template <typename scalar_t>
  static void run(const Forward<scalar_t>& p, bool causal) {
    const auto& k = kernels<scalar_t>();
    run_steps(p, k.forward[causal], k.decay);
  }
  template <typename scalar_t>
  static void run(const Backward<scalar_t>& p, bool causal) {
    const auto& k = kernels<scalar_t>();
    run_steps(p, k.backward[causal], k.decay);
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> bi_wkv_forward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                                                              const at::Tensor& v, bool causal, bool save) {
  return vrwkv_ops::forward<Cpu>(w, u, k, v, causal, save);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv_backward(const at::Tensor& gy, const at::Tensor& w,
                                                                           const at::Tensor& u, const at::Tensor& k,
                                                                           const at::Tensor& v, const at::Tensor& y,
                                                                           const at::Tensor& y_residual, const at::Tensor& z,
                                                                           bool causal) {
  return vrwkv_ops::backward<Cpu>(gy, w, u, k, v, y, y_residual, z, causal);
}

}  // namespace vrwkv_cpu
