// Bi-WKV over a block of kWidth channels and a chunk of at most kMaxChunk tokens, for any weights. On the CPU the compiler
// turns the loops over lanes into SIMD code; on CUDA a thread takes one channel. The including file defines
// VRWKV_CHUNK_CHANNELS and VRWKV_CHUNK_TOKENS. PyTorch headers must not be included here: this code is compiled for instruction
// sets that a processor may lack.
#pragma once

#include "../common/vector.h"
#include "params.h"
#include "state.h"

namespace {
namespace vrwkv {

using vrwkv_ops::acc_type;
using vrwkv_ops::View;
using vrwkv_ops::WkvBackwardParams;
using vrwkv_ops::WkvForwardParams;
using vrwkv_ops::WkvParams;

constexpr int kWidth = VRWKV_CHUNK_CHANNELS;
constexpr int kMaxChunk = VRWKV_CHUNK_TOKENS;
constexpr int kAlignment = kWidth % 16 == 0 ? 64 : 8;
// Loops over tokens prefetch this many tokens ahead: rows are too far apart for the hardware prefetcher, and a store that waits
// for its memory delays all others.
constexpr int kPrefetchTokens = 8;

template <typename T>
using ChannelVector = Vector<T, kWidth>;

// The states of all lanes, stored field by field, so that loops over lanes become SIMD code.
template <typename State, typename T>
struct alignas(kAlignment) StateVector {
  T field[State::kFields][kWidth];

  VRWKV_FN StateVector() {
    for (int j = 0; j < kWidth; ++j) set(j, State());
  }
  VRWKV_FN State get(int j) const {
    State s;
    s.for_each_field([&](T& x, int i) { x = field[i][j]; });
    return s;
  }
  VRWKV_FN void set(int j, State s) {
    s.for_each_field([&](T& x, int i) { field[i][j] = x; });
  }
  VRWKV_FN void copy_to(T (&to)[State::kFields][kWidth]) const {
    for (int i = 0; i < State::kFields; ++i) {
      for (int j = 0; j < kWidth; ++j) to[i][j] = field[i][j];
    }
  }
};

template <typename T>
using WkvStateVector = StateVector<WkvState<T>, T>;
template <typename T>
using GradStateVector = StateVector<GradState<T>, T>;

template <typename T>
struct ScaledVector {
  ChannelVector<T> mantissa, exponent;

  VRWKV_FN Scaled<T> get(int j) const { return {mantissa.x[j], exponent.x[j]}; }
  VRWKV_FN void set(int j, Scaled<T> x) { mantissa.x[j] = x.mantissa, exponent.x[j] = x.exponent; }
};

template <typename T>
struct DecayVector {
  ChannelVector<T> power, inverse, exponent;

  VRWKV_FN Decay<T> get(int j) const { return {power.x[j], inverse.x[j], exponent.x[j]}; }
  VRWKV_FN void set(int j, Decay<T> x) { power.x[j] = x.power, inverse.x[j] = x.inverse, exponent.x[j] = x.exponent; }
};

// The block of channels and the chunk of tokens that one call works on. In direction 0 states run from left to right, and
// tokens are counted from the start of the chunk; in direction 1 they run from right to left, and tokens are counted from its
// end.
template <typename scalar_t>
struct Chunk {
  using T = acc_type<scalar_t>;
  const WkvParams<scalar_t>& problem;
  int64_t b, index, c, first;
  int count, length;

  VRWKV_FN Chunk(const WkvParams<scalar_t>& p, int64_t batch_index, int64_t chunk_index, int64_t channel)
      : problem(p), b(batch_index), index(chunk_index), c(channel), first(index * p.chunk_length) {
    const int64_t lanes = p.channels - c, tokens = p.tokens - first;
    count = kWidth == 1 ? 1 : static_cast<int>(lanes < kWidth ? lanes : kWidth);
    length = static_cast<int>(tokens < p.chunk_length ? tokens : p.chunk_length);
  }

  VRWKV_FN void read(ChannelVector<T>& to, const View<scalar_t>& view, int t) const {
    load(to, view.row(b, first + t, c), view.channel_stride, count);
  }
  VRWKV_FN void read_values(ChannelVector<T>& to, int t) const {
    read(to, problem.v, t);
    for (int j = 0; j < kWidth; ++j) to.x[j] *= problem.headroom;
  }
  VRWKV_FN int64_t offset(int t) const { return (b * problem.tokens + first + t) * problem.channels + c; }

  template <typename... Views>
  VRWKV_FN void prefetch_inputs(int t, const Views&... views) const {
    if (t >= 0 && t < length) (prefetch<kWidth, false>(views.row(b, first + t, c)), ...);
  }
  template <typename... Outputs>
  VRWKV_FN void prefetch_outputs(int t, const Outputs*... outputs) const {
    if (t < length) (prefetch<kWidth, true>(outputs + offset(t)), ...);
  }

  VRWKV_FN T* state(int direction, int field, int fields) const {
    const int64_t plane = problem.batch * problem.chunks * problem.channels;
    return problem.states + (direction * fields + field) * plane + (b * problem.chunks + index) * problem.channels + c;
  }
  template <typename State>
  VRWKV_FN void read_state(StateVector<State, T>& to, int direction) const {
    if (!problem.states) return;  // a single chunk has no entering state
    for (int f = 0; f < State::kFields; ++f) {
      const T* from = state(direction, f, State::kFields);
      for (int j = 0; j < count; ++j) to.field[f][j] = from[j];
    }
  }
  template <typename State>
  VRWKV_FN void write_state(const StateVector<State, T>& from, int direction) const {
    for (int f = 0; f < State::kFields; ++f) {
      T* to = state(direction, f, State::kFields);
      for (int j = 0; j < count; ++j) to[j] = from.field[f][j];
    }
  }

  // Writes the chunk's parts of the gradients of w and u.
  VRWKV_FN void write_sums(const WkvBackwardParams<scalar_t>& p, const ChannelVector<T>& gw, const ChannelVector<T>& gu) const {
    const int64_t partial = (b * problem.chunks + index) * problem.channels + c;
    store(p.gw + partial, gw, count);
    store(p.gu + partial, gu, count);
  }
};

// The state of each chunk of an image is replaced by the joint state of all chunks before it (after it, in direction 1). On CUDA
// segments of the chunks run in parallel; their sums are needed first. Positions count chunks in the order of the direction.
constexpr int kSegments = 16;

template <template <typename> class State>
struct SegmentSum {
  PrefixState<State, double> carry;
  TokenSpan<double> passage;

  VRWKV_FN void append(const SegmentSum& next, double steps) {
    carry.append(next.carry, next.passage, steps);
    passage.extend(next.passage);
  }
};

template <template <typename> class State, typename P>
struct ChunkJoiner {
  using scalar_t = typename P::scalar_type;
  using T = typename P::acc_t;
  using States = StateVector<State<T>, T>;
  const P& p;
  int64_t b, c;
  int direction, segments, count;
  TokenSpan<double> whole[kWidth], last[kWidth];  // of a chunk, and of the last chunk, which may be shorter
  double steps[kWidth];

  VRWKV_FN ChunkJoiner(const P& problem, int64_t batch_index, int64_t channel, int which, int number)
      : p(problem), b(batch_index), c(channel), direction(which), segments(number), count(Chunk<scalar_t>(p, b, 0, c).count) {
    const Chunk<scalar_t> chunk(p, b, p.chunks - 1, c);
    for (int j = 0; j < count; ++j) {
      const double w = static_cast<double>(p.w[c + j]);
      whole[j] = TokenSpan<double>::of(w, static_cast<double>(p.chunk_length));
      last[j] = TokenSpan<double>::of(w, static_cast<double>(chunk.length));
      steps[j] = DistanceFactors<double>(w).steps;
    }
  }

  VRWKV_FN int64_t first(int segment) const { return p.chunks * segment / segments; }
  VRWKV_FN int64_t index(int64_t position) const { return direction == 0 ? position : p.chunks - 1 - position; }
  VRWKV_FN TokenSpan<double> passage(int64_t position, int j) const {
    const bool shorter = index(position) == p.chunks - 1;
    return {{shorter ? last[j].decay.mantissa : whole[j].decay.mantissa,
             shorter ? last[j].decay.exponent : whole[j].decay.exponent},
            shorter ? last[j].tokens : whole[j].tokens};
  }

  // Element j of `to` belongs to channel c + j.
  VRWKV_FN void sum_segment(int segment, SegmentSum<State>* to) const {
    for (int j = 0; j < count; ++j) to[j] = SegmentSum<State>();
    for (int64_t i = first(segment); i < first(segment + 1); ++i) {
      States own;
      Chunk<scalar_t>(p, b, index(i), c).read_state(own, direction);
      for (int j = 0; j < count; ++j) {
        to[j].carry.append(convert<double>(own.get(j)), passage(i, j), steps[j]);
        to[j].passage.extend(passage(i, j));
      }
    }
  }

  // `carried` holds the joint states of all segments before this one.
  VRWKV_FN void write_entering(int segment, PrefixState<State, double>* carried) const {
    for (int64_t i = first(segment); i < first(segment + 1); ++i) {
      const Chunk<scalar_t> chunk(p, b, index(i), c);
      States own, entering;
      chunk.read_state(own, direction);
      for (int j = 0; j < count; ++j) {
        entering.set(j, convert<T>(carried[j].entering()));
        carried[j].append(convert<double>(own.get(j)), passage(i, j), steps[j]);
      }
      chunk.write_state(entering, direction);
    }
  }
};

template <template <typename> class State, typename P>
VRWKV_FN void join_direction(const P& p, int64_t b, int64_t c, int direction) {
  PrefixState<State, double> carried[kWidth];
  ChunkJoiner<State, P>(p, b, c, direction, 1).write_entering(0, carried);
}

template <typename T>
VRWKV_FN void exp_vector(ScaledVector<T>& to, const ChannelVector<T>& x) {
  for (int j = 0; j < kWidth; ++j) to.set(j, exp_scaled(x.x[j]));
}

template <typename T>
VRWKV_FN void absorb(WkvStateVector<T>& state, const ScaledVector<T>& key, const DecayVector<T>& decay,
                     const ChannelVector<T>& v) {
  for (int j = 0; j < kWidth; ++j) {
    auto s = state.get(j);
    s.absorb(decay.get(j).grow(key.get(j)), v.x[j]);
    state.set(j, s);
  }
}

template <bool causal, typename scalar_t, typename ChunkType>
VRWKV_FN void careful_states(const WkvForwardParams<scalar_t>& p, const ChunkType& chunk) {
  using T = acc_type<scalar_t>;
  ChannelVector<T> k, v;
  ScaledVector<T> key;
  DecayVector<T> decay;
  WkvStateVector<T> before, after;
  for (int t = 0; t < chunk.length; ++t) {
    chunk.prefetch_inputs(t + kPrefetchTokens, p.k, p.v);
    chunk.read(k, p.k, t);
    chunk.read_values(v, t);
    exp_vector(key, k);
    chunk.read_decay(decay, t + 1);
    absorb(before, key, decay, v);
    if constexpr (!causal) {
      chunk.read_decay(decay, chunk.length - t);
      absorb(after, key, decay, v);
    }
  }
  chunk.write_state(before, 0);
  if constexpr (!causal) chunk.write_state(after, 1);
}

template <bool causal, typename scalar_t>
VRWKV_FN void combine(const WkvForwardParams<scalar_t>& p, int64_t b, int64_t c) {
  join_direction<WkvState>(p, b, c, 0);
  if constexpr (!causal) join_direction<WkvState>(p, b, c, 1);
}

template <typename scalar_t, typename T = acc_type<scalar_t>>
VRWKV_FN void write_output(const WkvForwardParams<scalar_t>& p, const Chunk<scalar_t>& chunk, int t, const ChannelVector<T>& y,
                           const ChannelVector<T>& denominator, const ChannelVector<T>& exponent) {
  store(p.y + chunk.offset(t), y, chunk.count);
  if (p.z) {
    ChannelVector<T> z;
    for (int j = 0; j < kWidth; ++j) z.x[j] = log_scaled(denominator.x[j], exponent.x[j]);
    store(p.z + chunk.offset(t), z, chunk.count);
  }
  if (p.y_residual) {
    ChannelVector<T> residual;
    for (int j = 0; j < kWidth; ++j) residual.x[j] = y.x[j] - cast<T>(cast<scalar_t>(y.x[j]));
    store(p.y_residual + chunk.offset(t), residual, chunk.count);
  }
}

template <bool causal, typename scalar_t, typename ChunkType>
VRWKV_FN void careful_outputs(const WkvForwardParams<scalar_t>& p, const ChunkType& chunk) {
  using T = acc_type<scalar_t>;
  const T lift = T(1) / p.headroom;
  ChannelVector<T> k, v, u;
  ScaledVector<T> key, bonus;
  DecayVector<T> decay, grow;
  load(u, p.u + chunk.c, 1, chunk.count);
  exp_vector(bonus, u);

  // The state to the right of each token; every element is written before it is read.
  alignas(kAlignment) T after[causal ? 1 : kMaxChunk][WkvState<T>::kFields][kWidth];
  if constexpr (!causal) {
    WkvStateVector<T> state;
    chunk.read_state(state, 1);
    for (int t = chunk.length - 1; t >= 0; --t) {
      state.copy_to(after[t]);
      chunk.prefetch_inputs(t - kPrefetchTokens, p.k, p.v);
      chunk.read(k, p.k, t);
      chunk.read_values(v, t);
      exp_vector(key, k);
      chunk.read_decay(decay, chunk.length - t);
      absorb(state, key, decay, v);
    }
  }

  WkvStateVector<T> state;
  chunk.read_state(state, 0);
  DecayVector<T> from_left, from_right;
  ChannelVector<T> y, denominator, exponent;
  for (int t = 0; t < chunk.length; ++t) {
    if constexpr (causal) chunk.prefetch_inputs(t + kPrefetchTokens, p.k, p.v);
    chunk.prefetch_outputs(t + kPrefetchTokens, p.y);
    if (p.z) chunk.prefetch_outputs(t + kPrefetchTokens, p.z);
    chunk.read(k, p.k, t);
    chunk.read_values(v, t);
    chunk.read_decay(from_left, t);
    chunk.read_decay(grow, t + 1);
    if constexpr (!causal) chunk.read_decay(from_right, chunk.length - 1 - t);
    const auto& held = after[causal ? 0 : t];
    for (int j = 0; j < kWidth; ++j) {
      const Scaled<T> weight = exp_scaled(k.x[j]);
      Output<T> out({weight.mantissa * bonus.mantissa.x[j], weight.exponent + bonus.exponent.x[j]}, v.x[j]);
      auto s = state.get(j);
      out.add(s, from_left.get(j));
      if constexpr (!causal) out.add(WkvState<T>{held[0][j], held[1][j], held[2][j]}, from_right.get(j));
      y.x[j] = out.y() * lift;
      denominator.x[j] = out.denominator, exponent.x[j] = out.exponent;
      s.absorb(grow.get(j).grow(weight), v.x[j]);
      state.set(j, s);
    }
    write_output(p, chunk, t, y, denominator, exponent);
  }
}

// gy, y (times headroom, like the values) and z of one token.
template <typename scalar_t>
struct SavedToken {
  using T = acc_type<scalar_t>;
  ChannelVector<T> gy, y, z;

  static VRWKV_FN void prefetch_inputs(const WkvBackwardParams<scalar_t>& p, const Chunk<scalar_t>& chunk, int t) {
    const int64_t image = p.tokens * p.channels;
    chunk.prefetch_inputs(t, p.gy, View<T>{p.z, image, p.channels, 1}, View<scalar_t>{p.y, image, p.channels, 1});
  }

  VRWKV_FN void read(const WkvBackwardParams<scalar_t>& p, const Chunk<scalar_t>& chunk, int t) {
    chunk.read(gy, p.gy, t);
    load(z, p.z + chunk.offset(t), 1, chunk.count);
    load(y, p.y + chunk.offset(t), 1, chunk.count);
    if (p.y_residual) {
      ChannelVector<T> residual;
      load(residual, p.y_residual + chunk.offset(t), 1, chunk.count);
      for (int j = 0; j < kWidth; ++j) y.x[j] += residual.x[j];
    }
    for (int j = 0; j < kWidth; ++j) y.x[j] *= p.headroom;
  }

  // e^(-z)
  VRWKV_FN Scaled<T> shrink(int j) const { return exp_scaled(-z.x[j]); }
};

template <typename T>
struct DistanceFactorsVector {
  ChannelVector<T> steps, origins;

  template <typename scalar_t>
  VRWKV_FN explicit DistanceFactorsVector(const Chunk<scalar_t>& chunk) {
    for (int j = 0; j < chunk.count; ++j) {
      const DistanceFactors<T> counting(chunk.problem.w[chunk.c + j]);
      steps.x[j] = counting.steps, origins.x[j] = counting.origins;
    }
  }
};

// A token contributes to the outputs after it, which are summed from the right, and, unless causal, to the outputs before it.
template <bool causal, typename scalar_t, typename ChunkType>
VRWKV_FN void careful_states(const WkvBackwardParams<scalar_t>& p, const ChunkType& chunk) {
  using T = acc_type<scalar_t>;
  const Distances<int64_t> distances{p.tokens, causal};
  const DistanceFactorsVector<T> counting(chunk);
  SavedToken<scalar_t> saved;
  DecayVector<T> decay;
  for (int direction = causal ? 1 : 0; direction < 2; ++direction) {
    GradStateVector<T> state;
    for (int i = 0; i < chunk.length; ++i) {
      const int t = direction == 0 ? i : chunk.length - 1 - i;
      saved.prefetch_inputs(p, chunk, direction == 0 ? t + kPrefetchTokens : t - kPrefetchTokens);
      saved.read(p, chunk, t);
      chunk.read_decay(decay, i + 1);
      const T origin = static_cast<T>(distances.origin(chunk.first + t, direction));
      for (int j = 0; j < kWidth; ++j) {
        auto s = state.get(j);
        s.absorb(decay.get(j).grow(saved.shrink(j)), saved.gy.x[j], saved.y.x[j], counting.steps.x[j],
                 counting.origins.x[j] * origin);
        state.set(j, s);
      }
    }
    chunk.write_state(state, direction);
  }
}

template <bool causal, typename scalar_t>
VRWKV_FN void combine(const WkvBackwardParams<scalar_t>& p, int64_t b, int64_t c) {
  join_direction<GradState>(p, b, c, 1);
  if constexpr (!causal) join_direction<GradState>(p, b, c, 0);
}

template <bool causal, typename scalar_t, typename ChunkType>
VRWKV_FN void careful_outputs(const WkvBackwardParams<scalar_t>& p, const ChunkType& chunk) {
  using T = acc_type<scalar_t>;
  const T lift = T(1) / p.headroom;
  const Distances<int64_t> distances{p.tokens, causal};
  const DistanceFactorsVector<T> counting(chunk);
  SavedToken<scalar_t> saved;
  ChannelVector<T> k, v, u, gw, gu;
  ScaledVector<T> bonus;
  DecayVector<T> decay, grow;
  load(u, p.u + chunk.c, 1, chunk.count);
  exp_vector(bonus, u);

  // The parts of gk and gv from the outputs after each token; every element is written before it is read.
  alignas(kAlignment) T after[kMaxChunk][2][kWidth];
  {
    GradStateVector<T> state;
    chunk.read_state(state, 1);
    for (int t = chunk.length - 1; t >= 0; --t) {
      chunk.prefetch_inputs(t - kPrefetchTokens, p.k, p.v);
      saved.prefetch_inputs(p, chunk, t - kPrefetchTokens);
      chunk.read(k, p.k, t);
      chunk.read_values(v, t);
      saved.read(p, chunk, t);
      chunk.read_decay(decay, chunk.length - 1 - t);
      chunk.read_decay(grow, chunk.length - t);
      const T origin = static_cast<T>(distances.origin(chunk.first + t, 1));
      const T own = static_cast<T>(distances.own(chunk.first + t, 1));
      auto& held = after[t];
      for (int j = 0; j < kWidth; ++j) {
        auto s = state.get(j);
        TokenGrad<T> grad;
        grad.add(s, decay.get(j), exp_scaled(k.x[j]), v.x[j], counting.origins.x[j] * own);
        held[0][j] = grad.gk, held[1][j] = grad.gv;
        gw.x[j] += grad.gw;
        s.absorb(grow.get(j).grow(saved.shrink(j)), saved.gy.x[j], saved.y.x[j], counting.steps.x[j],
                 counting.origins.x[j] * origin);
        state.set(j, s);
      }
    }
  }

  GradStateVector<T> state;
  if constexpr (!causal) chunk.read_state(state, 0);
  ChannelVector<T> gk, gv;
  for (int t = 0; t < chunk.length; ++t) {
    chunk.prefetch_outputs(t + kPrefetchTokens, p.gk, p.gv);
    chunk.read(k, p.k, t);
    chunk.read_values(v, t);
    saved.read(p, chunk, t);
    chunk.read_decay(decay, t);
    chunk.read_decay(grow, t + 1);
    const T origin = static_cast<T>(distances.origin(chunk.first + t, 0));
    const T own = static_cast<T>(distances.own(chunk.first + t, 0));
    const T far = static_cast<T>(distances.far(chunk.first + t) - 1);
    const auto& held = after[t];
    for (int j = 0; j < kWidth; ++j) {
      const Scaled<T> key = exp_scaled(k.x[j]);
      TokenGrad<T> grad;
      grad.add_self(key, bonus.get(j), saved.shrink(j), saved.gy.x[j], v.x[j], saved.y.x[j], counting.origins.x[j] * far);
      if constexpr (!causal) {
        auto s = state.get(j);
        grad.add(s, decay.get(j), key, v.x[j], counting.origins.x[j] * own);
        s.absorb(grow.get(j).grow(saved.shrink(j)), saved.gy.x[j], saved.y.x[j], counting.steps.x[j],
                 counting.origins.x[j] * origin);
        state.set(j, s);
      }
      gk.x[j] = (grad.gk + held[0][j]) * lift;
      gv.x[j] = grad.gv + held[1][j];
      gw.x[j] += grad.gw;
      gu.x[j] += grad.gu;
    }
    store(p.gk + chunk.offset(t), gk, chunk.count);
    store(p.gv + chunk.offset(t), gv, chunk.count);
  }
  for (int j = 0; j < kWidth; ++j) gw.x[j] *= lift, gu.x[j] *= lift;
  chunk.write_sums(p, gw, gu);
}

}  // namespace vrwkv
}  // namespace
