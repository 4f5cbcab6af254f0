// What the threads of the CUDA kernels do (csrc/cuda/bi_wkv.cu), one after the other on the CPU: the same templates, a warp of 32
// channels for each chunk of 16 tokens. test_cuda_on_cpu.py compiles it.
#include <cmath>
#include <utility>
#include <vector>

#define VRWKV_TILE_WIDTH 1
#define VRWKV_TILE_TOKENS 16
#include "block.h"

namespace {

using namespace vrwkv_ops;
using vrwkv::Block;
using vrwkv::kColumns;
using vrwkv::kMaxChunk;

int64_t careful_tiles = 0;

template <typename P>
struct Memory {
  std::vector<typename P::acc_t> decay, states;

  Memory(P& p, int rows, int fields) {
    p.chunk_length = std::min<int64_t>(p.tokens, rows * kMaxChunk);
    p.chunks = ceil_div(p.tokens, p.chunk_length);
    p.decay_rows = kMaxChunk + 1;
    p.headroom = std::ldexp(0.0625, -static_cast<int>(std::ceil(std::log2(p.tokens))));
    decay.resize(kDecayColumns * p.decay_rows * p.channels);
    states.resize(2 * fields * p.batch * p.chunks * p.channels);
    p.decay = decay.data();
    p.states = p.chunks > 1 ? states.data() : nullptr;
    for (int64_t c = 0; c < p.channels; ++c) vrwkv::fill_decay(p, c);
  }
};

template <typename P, typename T>
void load(const Block<P>& block, T* to, const View<T>& view, T none) {
  std::fill(to + block.tokens * kColumns, to + block.rows * kMaxChunk * kColumns, none);
  for (int t = 0; t < block.tokens; ++t)
    for (int j = 0; j < kColumns; ++j)
      if (block.has_column(j)) to[t * kColumns + j] = *view.row(block.b, block.first + t, block.c + j);
}

template <typename P, typename T>
void store(const Block<P>& block, T* tensor, const T* from) {
  for (int t = 0; t < block.tokens; ++t)
    for (int j = 0; j < kColumns; ++j)
      if (block.has_column(j)) tensor[block.offset(t) + j] = from[t * kColumns + j];
}

template <typename scalar_t>
void load_inputs(const Block<Forward<scalar_t>>& block) {
  load(block, block.input(vrwkv::kKeys, 0), block.p.k, vrwkv::key_of_none<scalar_t>());
  load(block, block.input(vrwkv::kValues, 0), block.p.v, scalar_t(0));
}

template <typename scalar_t>
void load_inputs(const Block<Backward<scalar_t>>& block) {
  const auto& p = block.p;
  const int64_t image = p.tokens * p.channels;
  const auto contiguous = [&](const auto* data) { return View<std::decay_t<decltype(*data)>>{data, image, p.channels, 1}; };
  load(block, block.input(vrwkv::kKeys, 0), p.k, vrwkv::key_of_none<scalar_t>());
  load(block, block.input(vrwkv::kValues, 0), p.v, scalar_t(0));
  load(block, block.input(vrwkv::kGrads, 0), p.gy, scalar_t(0));
  load(block, block.input(vrwkv::kOutputs, 0), contiguous(p.y), scalar_t(0));
  if (p.y_residual) load(block, block.input(vrwkv::kResiduals, 0), contiguous(p.y_residual), scalar_t(0));
  load(block, block.log(0), contiguous(p.z), vrwkv::kLogOfNone);
}

template <typename scalar_t>
void store_outputs(const Block<Forward<scalar_t>>& block) {
  store(block, block.p.y, block.input(vrwkv::kKeys, 0));
  if (block.p.y_residual) store(block, block.p.y_residual, block.input(vrwkv::kValues, 0));
}

template <typename scalar_t>
void store_outputs(const Block<Backward<scalar_t>>& block) {
  store(block, block.p.gk, block.input(vrwkv::kKeys, 0));
  store(block, block.p.gv, block.input(vrwkv::kValues, 0));
}

template <typename scalar_t>
void store_sums(const Block<Forward<scalar_t>>&) {}

template <typename scalar_t>
void store_sums(const Block<Backward<scalar_t>>& block) {
  const auto& p = block.p;
  for (int j = 0; j < kColumns && block.has_column(j); ++j) {
    const int64_t at = (block.b * p.chunks + block.tile) * p.channels + block.c + j;
    p.gw[at] = p.gu[at] = 0;
    for (int row = 0; row < block.rows; ++row) p.gw[at] += *block.sum(row, 0, j), p.gu[at] += *block.sum(row, 1, j);
  }
}

// A launch of tile_kernel: between the loops over threads all of them meet.
template <typename Pass, bool outputs>
void run_tiles(const typename Pass::P& p, int rows) {
  using Tile = Block<typename Pass::P>;
  std::vector<double> memory(Tile::bytes(rows) / sizeof(double) + 1);
  for (int64_t index = 0; index < p.batch * p.chunks * Tile::column_blocks(p.channels); ++index) {
    std::fill(memory.begin(), memory.end(), std::nan(""));
    const Tile block(p, rows, memory.data(), index);
    load_inputs(block);
    std::vector<typename Pass::Fast> chunks;
    for (int i = 0; i < rows * kColumns; ++i) chunks.emplace_back(block, i / kColumns, i % kColumns);
    const auto careful_for = [&](auto body) {
      for (int i = 0; i < rows * kColumns; ++i)
        if (block.has_column(i % kColumns)) body(i / kColumns, i % kColumns);
    };
    bool careful = false;
    for (const auto& chunk : chunks) careful |= !chunk.fits;
    if (careful) {
      careful_for([&](int row, int column) { Pass::careful_states(block, row, column); });
    } else {
      for (const auto& chunk : chunks) chunk.states();
    }
    for (int i = 0; i < Pass::kDirections * kColumns; ++i)
      if (block.has_column(i % kColumns))
        block.template join<Pass::template State>(Pass::kFirstDirection + i / kColumns, i % kColumns, !outputs);
    if (outputs) {
      for (const auto& chunk : chunks) careful |= !chunk.outputs_fit();
      if (careful) {
        careful_for([&](int row, int column) { Pass::careful_outputs(block, row, column); });
      } else {
        for (const auto& chunk : chunks) chunk.outputs();
        store_outputs(block);
      }
      store_sums(block);
    }
    careful_tiles += careful;
  }
}

// A launch of join_kernel, likewise.
template <typename Pass>
void join(const typename Pass::P& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int i = 0; i < Pass::kDirections; ++i) {
      for (int64_t c = 0; c < p.channels; ++c) {
        std::vector<vrwkv::Segment<Pass::template State>> sums(vrwkv::kSegments);
        const vrwkv::Joiner<Pass::template State, typename Pass::P> joiner(p, b, c, Pass::kFirstDirection + i,
                                                                           vrwkv::kSegments);
        for (int s = 0; s < vrwkv::kSegments; ++s) joiner.sum_up(s, &sums[s]);
        for (int s = 0; s < vrwkv::kSegments; ++s) joiner.enter(s, sums.data(), 1);
      }
    }
  }
}

template <typename Pass>
void run_pass(const typename Pass::P& p) {
  const int rows = static_cast<int>(ceil_div(p.chunk_length, kMaxChunk));
  if (p.chunks > 1) {
    run_tiles<Pass, false>(p, rows);
    join<Pass>(p);
  }
  run_tiles<Pass, true>(p, rows);
}

template <typename scalar_t, bool causal>
void forward(Forward<scalar_t> p, int rows) {
  const Memory memory(p, rows, vrwkv::WkvState<float>::kFields);
  run_pass<vrwkv::ForwardPass<scalar_t, causal>>(p);
}

template <typename scalar_t, bool causal>
void backward(Backward<scalar_t> p, int rows) {
  const Memory memory(p, rows, vrwkv::GradState<float>::kFields);
  std::vector<acc_type<scalar_t>> gw(p.batch * p.chunks * p.channels), gu(gw.size());
  const auto sum_gw = p.gw, sum_gu = p.gu;
  p.gw = gw.data(), p.gu = gu.data();
  run_pass<vrwkv::BackwardPass<scalar_t, causal>>(p);
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

// Tiles that the careful way has taken since the last call.
extern "C" int64_t take_careful_tiles() { return std::exchange(careful_tiles, 0); }

#define DEFINE_OPERATORS(name, scalar_t)                                                                              \
  extern "C" void name##_forward(const int64_t* sizes, int rows, int causal, const float* w, const float* u,          \
                                 const scalar_t* k, const scalar_t* v, scalar_t* y, scalar_t* y_residual, float* z) { \
    Forward<scalar_t> p;                                                                                              \
    set_problem(p, sizes, w, u, k, v);                                                                                \
    p.y = y, p.y_residual = y_residual, p.z = z;                                                                      \
    causal ? forward<scalar_t, true>(p, rows) : forward<scalar_t, false>(p, rows);                                    \
  }                                                                                                                   \
  extern "C" void name##_backward(const int64_t* sizes, int rows, int causal, const scalar_t* gy, const float* w,     \
                                  const float* u, const scalar_t* k, const scalar_t* v, const scalar_t* y,            \
                                  const scalar_t* y_residual, const float* z, float* gw, float* gu, scalar_t* gk,     \
                                  scalar_t* gv) {                                                                     \
    Backward<scalar_t> p;                                                                                             \
    set_problem(p, sizes, w, u, k, v);                                                                                \
    p.gy = {gy, p.tokens * p.channels, p.channels, 1};                                                                \
    p.y = y, p.y_residual = y_residual, p.z = z;                                                                      \
    p.gw = gw, p.gu = gu, p.gk = gk, p.gv = gv;                                                                       \
    causal ? backward<scalar_t, true>(p, rows) : backward<scalar_t, false>(p, rows);                                  \
  }

DEFINE_OPERATORS(float32, float)
DEFINE_OPERATORS(bfloat16, c10::BFloat16)
