// What a thread of the CUDA kernels does (csrc/cuda/bi_wkv.cu), one thread after the other on the CPU: the same templates, one
// channel wide, in chunks of 32 tokens, joined in segments. test_cuda_on_cpu.py compiles it.
#include <cmath>
#include <vector>

#define VRWKV_TILE_WIDTH 1
#define VRWKV_TILE_TOKENS 32
#include "tile.h"

namespace {

using namespace vrwkv_ops;

template <typename scalar_t>
struct Memory {
  std::vector<acc_type<scalar_t>> decay, states;

  Memory(Problem<scalar_t>& p, int fields) {
    p.chunk_length = std::min<int64_t>(p.tokens, VRWKV_TILE_TOKENS);
    p.chunks = ceil_div(p.tokens, p.chunk_length);
    p.headroom = std::ldexp(0.0625, -static_cast<int>(std::ceil(std::log2(p.tokens))));
    decay.resize(kDecayColumns * (p.chunk_length + 1) * p.channels);
    states.resize(2 * fields * p.batch * p.chunks * p.channels);
    p.decay = decay.data();
    p.states = p.chunks > 1 ? states.data() : nullptr;
    for (int64_t c = 0; c < p.channels; ++c) vrwkv::fill_decay(p, c);
  }
};

// A block of threads: between the loops all threads meet.
template <template <typename> class State, typename P>
void join(const P& p, int direction) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t c = 0; c < p.channels; ++c) {
      std::vector<vrwkv::Segment<State>> sums(vrwkv::kSegments);
      const vrwkv::Joiner<State, P> joiner(p, b, c, direction, vrwkv::kSegments);
      for (int s = 0; s < vrwkv::kSegments; ++s) joiner.sum_up(s, &sums[s]);
      for (int s = 0; s < vrwkv::kSegments; ++s) joiner.enter(s, sums.data(), 1);
    }
  }
}

template <typename P, typename Body>
void for_each_thread(const P& p, const Body& body) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
      for (int64_t c = 0; c < p.channels; ++c) body(b, chunk, c);
    }
  }
}

template <typename scalar_t, bool causal>
void forward(Forward<scalar_t> p) {
  const Memory<scalar_t> memory(p, vrwkv::WkvState<float>::kFields);
  if (p.chunks > 1) {
    for_each_thread(p, [&](auto... at) { vrwkv::forward_states<scalar_t, causal>(p, at...); });
    join<vrwkv::WkvState>(p, 0);
    if (!causal) join<vrwkv::WkvState>(p, 1);
  }
  for_each_thread(p, [&](auto... at) { vrwkv::forward_outputs<scalar_t, causal>(p, at...); });
}

template <typename scalar_t, bool causal>
void backward(Backward<scalar_t> p) {
  const Memory<scalar_t> memory(p, vrwkv::GradState<float>::kFields);
  std::vector<acc_type<scalar_t>> gw(p.batch * p.chunks * p.channels), gu(gw.size());
  const auto sum_gw = p.gw, sum_gu = p.gu;
  p.gw = gw.data(), p.gu = gu.data();
  if (p.chunks > 1) {
    for_each_thread(p, [&](auto... at) { vrwkv::backward_states<scalar_t, causal>(p, at...); });
    join<vrwkv::GradState>(p, 1);
    if (!causal) join<vrwkv::GradState>(p, 0);
  }
  for_each_thread(p, [&](auto... at) { vrwkv::backward_outputs<scalar_t, causal>(p, at...); });
  for (int64_t c = 0; c < p.channels; ++c) {
    double w = 0., u = 0.;
    for (size_t i = c; i < gw.size(); i += p.channels) w += gw[i], u += gu[i];
    sum_gw[c] = w, sum_gu[c] = u;
  }
}

template <typename scalar_t, typename P>
void set_problem(P& p, const int64_t* sizes, const float* w, const float* u, const scalar_t* k, const scalar_t* v) {
  p.batch = sizes[0], p.tokens = sizes[1], p.channels = sizes[2];
  p.w = w, p.u = u;
  const int64_t image = p.tokens * p.channels;
  p.k = {k, image, p.channels, 1}, p.v = {v, image, p.channels, 1};
}

}  // namespace

#define DEFINE_OPERATORS(name, scalar_t)                                                                                \
  extern "C" void name##_forward(const int64_t* sizes, int causal, const float* w, const float* u, const scalar_t* k,   \
                                 const scalar_t* v, scalar_t* y, scalar_t* y_residual, float* z) {                      \
    Forward<scalar_t> p;                                                                                                \
    set_problem(p, sizes, w, u, k, v);                                                                                  \
    p.y = y, p.y_residual = y_residual, p.z = z;                                                                        \
    causal ? forward<scalar_t, true>(p) : forward<scalar_t, false>(p);                                                  \
  }                                                                                                                     \
  extern "C" void name##_backward(const int64_t* sizes, int causal, const scalar_t* gy, const float* w, const float* u, \
                                  const scalar_t* k, const scalar_t* v, const scalar_t* y, const scalar_t* y_residual,  \
                                  const float* z, float* gw, float* gu, scalar_t* gk, scalar_t* gv) {                   \
    Backward<scalar_t> p;                                                                                               \
    set_problem(p, sizes, w, u, k, v);                                                                                  \
    p.gy = {gy, p.tokens * p.channels, p.channels, 1};                                                                  \
    p.y = y, p.y_residual = y_residual, p.z = z;                                                                        \
    p.gw = gw, p.gu = gu, p.gk = gk, p.gv = gv;                                                                         \
    causal ? backward<scalar_t, true>(p) : backward<scalar_t, false>(p);                                                \
  }

DEFINE_OPERATORS(float32, float)
DEFINE_OPERATORS(bfloat16, c10::BFloat16)
