// Bi-WKV over a block of kWidth channels and a chunk of at most kMaxChunk tokens, for any weights. On the CPU these are plain
// loops over lanes, which the compiler turns into vector code; on CUDA a thread is a block of one channel. The including file
// defines VRWKV_TILE_WIDTH and VRWKV_TILE_TOKENS. No PyTorch header may come in here.
#pragma once

#include "lanes.h"
#include "problem.h"
#include "state.h"

namespace {
namespace vrwkv {

using vrwkv_ops::acc_type;
using vrwkv_ops::Backward;
using vrwkv_ops::Forward;
using vrwkv_ops::Problem;
using vrwkv_ops::View;

constexpr int kWidth = VRWKV_TILE_WIDTH;
constexpr int kMaxChunk = VRWKV_TILE_TOKENS;
constexpr int kAlignment = kWidth % 16 == 0 ? 64 : 8;
// Loops over tokens ask for memory as many tokens ahead: a processor does not see the pattern in blocks this far apart, and a
// store that has to wait for its memory holds up all others.
constexpr int kAhead = 8;

template <typename T>
using Lanes = LanesOf<T, kWidth>;

// States of all lanes, a field at a time, so that a loop over lanes is a loop over vectors.
template <typename State, typename T>
struct alignas(kAlignment) StateLanes {
  T field[State::kFields][kWidth];

  VRWKV_FN StateLanes() {
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
using WkvLanes = StateLanes<WkvState<T>, T>;
template <typename T>
using GradLanes = StateLanes<GradState<T>, T>;

template <typename T>
struct ScaledLanes {
  Lanes<T> mantissa, exponent;

  VRWKV_FN Scaled<T> get(int j) const { return {mantissa.x[j], exponent.x[j]}; }
  VRWKV_FN void set(int j, Scaled<T> x) { mantissa.x[j] = x.mantissa, exponent.x[j] = x.exponent; }
};

template <typename T>
struct DecayLanes {
  Lanes<T> power, inverse, exponent;

  VRWKV_FN Decay<T> get(int j) const { return {power.x[j], inverse.x[j], exponent.x[j]}; }
};

// The block of channels and the chunk of tokens that one call works on. In direction 0 a state runs from left to right and a
// token is counted from the chunk's start; in direction 1, from right to left and from its end.
template <typename scalar_t>
struct Tile {
  using T = acc_type<scalar_t>;
  const Problem<scalar_t>& problem;
  int64_t b, chunk, c, first;
  int count, length;

  VRWKV_FN Tile(const Problem<scalar_t>& p, int64_t batch_index, int64_t chunk_index, int64_t channel)
      : problem(p), b(batch_index), chunk(chunk_index), c(channel), first(chunk * p.chunk_length) {
    const int64_t lanes = p.channels - c, tokens = p.tokens - first;
    count = kWidth == 1 ? 1 : static_cast<int>(lanes < kWidth ? lanes : kWidth);
    length = static_cast<int>(tokens < p.chunk_length ? tokens : p.chunk_length);
  }

  VRWKV_FN void read(Lanes<T>& to, const View<scalar_t>& view, int t) const {
    load(to, view.row(b, first + t, c), view.channel_stride, count);
  }
  VRWKV_FN void read_values(Lanes<T>& to, int t) const {
    read(to, problem.v, t);
    for (int j = 0; j < kWidth; ++j) to.x[j] *= problem.headroom;
  }
  VRWKV_FN int64_t offset(int t) const { return (b * problem.tokens + first + t) * problem.channels + c; }

  template <typename... Views>
  VRWKV_FN void will_read(int t, const Views&... views) const {
    if (t >= 0 && t < length) (prefetch<kWidth, false>(views.row(b, first + t, c)), ...);
  }
  template <typename... Outputs>
  VRWKV_FN void will_write(int t, const Outputs*... outputs) const {
    if (t < length) (prefetch<kWidth, true>(outputs + offset(t)), ...);
  }

  // e^(w n)
  VRWKV_FN void read_decay(DecayLanes<T>& to, int n) const {
    const int64_t column = problem.decay_rows * problem.channels;
    const T* row = problem.decay + n * problem.channels + c;
    load(to.power, row, 1, count);
    load(to.inverse, row + column, 1, count);
    load(to.exponent, row + 2 * column, 1, count);
  }

  VRWKV_FN T* state(int direction, int field, int fields) const {
    const int64_t plane = problem.batch * problem.chunks * problem.channels;
    return problem.states + (direction * fields + field) * plane + (b * problem.chunks + chunk) * problem.channels + c;
  }
  template <typename State>
  VRWKV_FN void read_state(StateLanes<State, T>& to, int direction) const {
    if (!problem.states) return;  // a single chunk: nothing comes in
    for (int f = 0; f < State::kFields; ++f) {
      const T* from = state(direction, f, State::kFields);
      for (int j = 0; j < count; ++j) to.field[f][j] = from[j];
    }
  }
  template <typename State>
  VRWKV_FN void write_state(const StateLanes<State, T>& from, int direction) const {
    for (int f = 0; f < State::kFields; ++f) {
      T* to = state(direction, f, State::kFields);
      for (int j = 0; j < count; ++j) to[j] = from.field[f][j];
    }
  }

  // What the chunk adds to the gradients of w and u.
  VRWKV_FN void write_sums(const Backward<scalar_t>& p, const Lanes<T>& gw, const Lanes<T>& gu) const {
    const int64_t partial = (b * problem.chunks + chunk) * problem.channels + c;
    store(p.gw + partial, gw, count);
    store(p.gu + partial, gu, count);
  }
};

template <typename scalar_t>
VRWKV_FN void fill_decay(const Problem<scalar_t>& p, int64_t c) {
  using T = acc_type<scalar_t>;
  const Tile<scalar_t> tile(p, 0, 0, c);
  ScaledLanes<double> ratio, at;
  for (int j = 0; j < kWidth; ++j) {
    const DecayPowers powers(j < tile.count ? static_cast<double>(p.w[c + j]) : 0.);
    ratio.set(j, powers.ratio), at.set(j, powers.at);
  }
  const int64_t column = p.decay_rows * p.channels;
  Lanes<T> power, inverse, whole;
  for (int64_t n = 0; n < p.decay_rows; ++n) {
    for (int j = 0; j < kWidth; ++j) {
      DecayPowers powers(ratio.get(j), at.get(j));
      const Decay<T> row = powers.row<T>();
      power.x[j] = row.power, inverse.x[j] = row.inverse, whole.x[j] = row.exponent;
      powers.next();
      at.set(j, powers.at);
    }
    T* to = p.decay + n * p.channels + c;
    store(to, power, tile.count);
    store(to + column, inverse, tile.count);
    store(to + 2 * column, whole, tile.count);
  }
}

// The chunks of an image are joined in segments, which run at the same time on CUDA: each is summed up on its own, then the
// state of each chunk in it is replaced by what all chunks before it hold (after it, in direction 1). Positions count chunks
// in the order of the direction.
constexpr int kSegments = 16;

template <template <typename> class State>
struct Segment {
  Carry<State, double> carry;
  Passage<double> passage;
};

template <template <typename> class State, typename P>
struct Joiner {
  using scalar_t = typename P::scalar_type;
  using T = typename P::acc_t;
  using Lanes = StateLanes<State<T>, T>;
  const P& p;
  int64_t b, c;
  int direction, segments, count;
  Passage<double> whole[kWidth], last[kWidth];  // those of a chunk, and of the last chunk, which may be shorter
  double steps[kWidth];

  VRWKV_FN Joiner(const P& problem, int64_t batch_index, int64_t channel, int which, int number)
      : p(problem), b(batch_index), c(channel), direction(which), segments(number), count(Tile<scalar_t>(p, b, 0, c).count) {
    const Tile<scalar_t> tile(p, b, p.chunks - 1, c);
    for (int j = 0; j < count; ++j) {
      const double w = static_cast<double>(p.w[c + j]);
      whole[j] = Passage<double>::of(w, static_cast<double>(p.chunk_length));
      last[j] = Passage<double>::of(w, static_cast<double>(tile.length));
      steps[j] = Counting<double>(w).steps;
    }
  }

  VRWKV_FN int64_t first(int segment) const { return p.chunks * segment / segments; }
  VRWKV_FN int64_t chunk(int64_t position) const { return direction == 0 ? position : p.chunks - 1 - position; }
  VRWKV_FN Passage<double> passage(int64_t position, int j) const {
    const bool shorter = chunk(position) == p.chunks - 1;
    return {{shorter ? last[j].decay.mantissa : whole[j].decay.mantissa,
             shorter ? last[j].decay.exponent : whole[j].decay.exponent},
            shorter ? last[j].tokens : whole[j].tokens};
  }

  // Segment j of `to` is that of channel c + j.
  VRWKV_FN void sum_up(int segment, Segment<State>* to) const {
    for (int j = 0; j < count; ++j) to[j] = Segment<State>();
    for (int64_t i = first(segment); i < first(segment + 1); ++i) {
      Lanes own;
      Tile<scalar_t>(p, b, chunk(i), c).read_state(own, direction);
      for (int j = 0; j < count; ++j) {
        to[j].carry.append(convert<double>(own.get(j)), passage(i, j), steps[j]);
        to[j].passage.extend(passage(i, j));
      }
    }
  }

  // `sums` are those of all segments, `stride` apart.
  VRWKV_FN void enter(int segment, const Segment<State>* sums, int stride) const {
    Carry<State, double> carried[kWidth];
    for (int s = 0; s < segment; ++s) {
      for (int j = 0; j < count; ++j) {
        const Segment<State>& sum = sums[s * stride + j];
        carried[j].append(sum.carry, sum.passage, steps[j]);
      }
    }
    for (int64_t i = first(segment); i < first(segment + 1); ++i) {
      const Tile<scalar_t> tile(p, b, chunk(i), c);
      Lanes own, entering;
      tile.read_state(own, direction);
      for (int j = 0; j < count; ++j) {
        entering.set(j, convert<T>(carried[j].enter()));
        carried[j].append(convert<double>(own.get(j)), passage(i, j), steps[j]);
      }
      tile.write_state(entering, direction);
    }
  }
};

// On the CPU one segment takes the fewest steps. Very long sequences are joined as on CUDA, so that tests reach that here.
template <template <typename> class State, typename P>
VRWKV_FN void join_direction(const P& p, int64_t b, int64_t c, int direction) {
  Segment<State> sums[kSegments * kWidth];
  const Joiner<State, P> joiner(p, b, c, direction, p.chunks < 256 ? 1 : kSegments);
  for (int s = 0; s < joiner.segments - 1; ++s) joiner.sum_up(s, sums + s * kWidth);
  for (int s = 0; s < joiner.segments; ++s) joiner.enter(s, sums, kWidth);
}

template <typename T>
VRWKV_FN void exp_lanes(ScaledLanes<T>& to, const Lanes<T>& x, T sign) {
  for (int j = 0; j < kWidth; ++j) to.set(j, exp_scaled(sign * x.x[j]));
}

template <typename T>
VRWKV_FN void absorb(WkvLanes<T>& state, const ScaledLanes<T>& key, const DecayLanes<T>& decay, const Lanes<T>& v) {
  for (int j = 0; j < kWidth; ++j) {
    auto s = state.get(j);
    s.absorb(decay.get(j).grow(key.get(j)), v.x[j]);
    state.set(j, s);
  }
}

template <bool causal, typename scalar_t, typename TileOf>
VRWKV_FN void forward_states(const Forward<scalar_t>& p, const TileOf& tile) {
  using T = acc_type<scalar_t>;
  Lanes<T> k, v;
  ScaledLanes<T> key;
  DecayLanes<T> decay;
  WkvLanes<T> before, after;
  for (int t = 0; t < tile.length; ++t) {
    tile.will_read(t + kAhead, p.k, p.v);
    tile.read(k, p.k, t);
    tile.read_values(v, t);
    exp_lanes(key, k, T(1));
    tile.read_decay(decay, t + 1);
    absorb(before, key, decay, v);
    if constexpr (!causal) {
      tile.read_decay(decay, tile.length - t);
      absorb(after, key, decay, v);
    }
  }
  tile.write_state(before, 0);
  if constexpr (!causal) tile.write_state(after, 1);
}

template <typename scalar_t, bool causal>
VRWKV_FN void forward_combine(const Forward<scalar_t>& p, int64_t b, int64_t c) {
  join_direction<WkvState>(p, b, c, 0);
  if constexpr (!causal) join_direction<WkvState>(p, b, c, 1);
}

template <bool causal, typename scalar_t, typename TileOf>
VRWKV_FN void forward_outputs(const Forward<scalar_t>& p, const TileOf& tile) {
  using T = acc_type<scalar_t>;
  const T lift = T(1) / p.headroom;
  Lanes<T> k, v, u;
  ScaledLanes<T> key, bonus;
  DecayLanes<T> decay, grow;
  load(u, p.u + tile.c, 1, tile.count);
  exp_lanes(bonus, u, T(1));

  // The state to the right of each token, written before it is read.
  alignas(kAlignment) T after[causal ? 1 : kMaxChunk][WkvState<T>::kFields][kWidth];
  if constexpr (!causal) {
    WkvLanes<T> state;
    tile.read_state(state, 1);
    for (int t = tile.length - 1; t >= 0; --t) {
      state.copy_to(after[t]);
      tile.will_read(t - kAhead, p.k, p.v);
      tile.read(k, p.k, t);
      tile.read_values(v, t);
      exp_lanes(key, k, T(1));
      tile.read_decay(decay, tile.length - t);
      absorb(state, key, decay, v);
    }
  }

  WkvLanes<T> state;
  tile.read_state(state, 0);
  DecayLanes<T> from_left, from_right;
  Lanes<T> y, denominator, exponent;
  for (int t = 0; t < tile.length; ++t) {
    if constexpr (causal) tile.will_read(t + kAhead, p.k, p.v);
    tile.will_write(t + kAhead, p.y);
    if (p.z) tile.will_write(t + kAhead, p.z);
    tile.read(k, p.k, t);
    tile.read_values(v, t);
    tile.read_decay(from_left, t);
    tile.read_decay(grow, t + 1);
    if constexpr (!causal) tile.read_decay(from_right, tile.length - 1 - t);
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
    store(p.y + tile.offset(t), y, tile.count);
    if (p.z) {
      Lanes<T> z;
      for (int j = 0; j < kWidth; ++j) z.x[j] = log_scaled(denominator.x[j], exponent.x[j]);
      store(p.z + tile.offset(t), z, tile.count);
    }
    if (p.y_residual) {
      Lanes<T> residual;
      for (int j = 0; j < kWidth; ++j) residual.x[j] = y.x[j] - static_cast<T>(static_cast<scalar_t>(y.x[j]));
      store(p.y_residual + tile.offset(t), residual, tile.count);
    }
  }
}

// gy, y (with headroom, as values have it) and e^(-z) of one token.
template <typename scalar_t>
struct Saved {
  using T = acc_type<scalar_t>;
  Lanes<T> gy, y;
  ScaledLanes<T> shrink;

  VRWKV_FN void will_read(const Backward<scalar_t>& p, const Tile<scalar_t>& tile, int t) const {
    const int64_t image = p.tokens * p.channels;
    tile.will_read(t, p.gy, View<T>{p.z, image, p.channels, 1}, View<scalar_t>{p.y, image, p.channels, 1});
  }

  VRWKV_FN void read(const Backward<scalar_t>& p, const Tile<scalar_t>& tile, int t) {
    Lanes<T> z;
    tile.read(gy, p.gy, t);
    load(z, p.z + tile.offset(t), 1, tile.count);
    load(y, p.y + tile.offset(t), 1, tile.count);
    exp_lanes(shrink, z, T(-1));
    if (p.y_residual) {
      Lanes<T> residual;
      load(residual, p.y_residual + tile.offset(t), 1, tile.count);
      for (int j = 0; j < kWidth; ++j) y.x[j] += residual.x[j];
    }
    for (int j = 0; j < kWidth; ++j) y.x[j] *= p.headroom;
  }
};

template <typename T>
struct CountingLanes {
  Lanes<T> steps, origins;

  template <typename scalar_t>
  VRWKV_FN explicit CountingLanes(const Tile<scalar_t>& tile) {
    for (int j = 0; j < tile.count; ++j) {
      const Counting<T> counting(tile.problem.w[tile.c + j]);
      steps.x[j] = counting.steps, origins.x[j] = counting.origins;
    }
  }
};

// A token gives to the outputs after it, whose sums come from the right, and, unless causal, to those before it.
template <bool causal, typename scalar_t, typename TileOf>
VRWKV_FN void backward_states(const Backward<scalar_t>& p, const TileOf& tile) {
  using T = acc_type<scalar_t>;
  const Distances<int64_t> distances{p.tokens, causal};
  const CountingLanes<T> counting(tile);
  Saved<scalar_t> saved;
  DecayLanes<T> decay;
  for (int direction = causal ? 1 : 0; direction < 2; ++direction) {
    GradLanes<T> state;
    for (int i = 0; i < tile.length; ++i) {
      const int t = direction == 0 ? i : tile.length - 1 - i;
      saved.will_read(p, tile, direction == 0 ? t + kAhead : t - kAhead);
      saved.read(p, tile, t);
      tile.read_decay(decay, i + 1);
      const T origin = static_cast<T>(distances.origin(tile.first + t, direction));
      for (int j = 0; j < kWidth; ++j) {
        auto s = state.get(j);
        s.absorb(decay.get(j).grow(saved.shrink.get(j)), saved.gy.x[j], saved.y.x[j], counting.steps.x[j],
                 counting.origins.x[j] * origin);
        state.set(j, s);
      }
    }
    tile.write_state(state, direction);
  }
}

template <typename scalar_t, bool causal>
VRWKV_FN void backward_combine(const Backward<scalar_t>& p, int64_t b, int64_t c) {
  join_direction<GradState>(p, b, c, 1);
  if constexpr (!causal) join_direction<GradState>(p, b, c, 0);
}

template <bool causal, typename scalar_t, typename TileOf>
VRWKV_FN void backward_outputs(const Backward<scalar_t>& p, const TileOf& tile) {
  using T = acc_type<scalar_t>;
  const T lift = T(1) / p.headroom;
  const Distances<int64_t> distances{p.tokens, causal};
  const CountingLanes<T> counting(tile);
  Saved<scalar_t> saved;
  Lanes<T> k, v, u, gw, gu;
  ScaledLanes<T> bonus;
  DecayLanes<T> decay, grow;
  load(u, p.u + tile.c, 1, tile.count);
  exp_lanes(bonus, u, T(1));

  // What the outputs after each token give to its gk and gv, written before it is read.
  alignas(kAlignment) T after[kMaxChunk][2][kWidth];
  {
    GradLanes<T> state;
    tile.read_state(state, 1);
    for (int t = tile.length - 1; t >= 0; --t) {
      tile.will_read(t - kAhead, p.k, p.v);
      saved.will_read(p, tile, t - kAhead);
      tile.read(k, p.k, t);
      tile.read_values(v, t);
      saved.read(p, tile, t);
      tile.read_decay(decay, tile.length - 1 - t);
      tile.read_decay(grow, tile.length - t);
      const T origin = static_cast<T>(distances.origin(tile.first + t, 1));
      const T own = static_cast<T>(distances.own(tile.first + t, 1));
      auto& held = after[t];
      for (int j = 0; j < kWidth; ++j) {
        auto s = state.get(j);
        TokenGrad<T> grad;
        grad.add(s, decay.get(j), exp_scaled(k.x[j]), v.x[j], counting.origins.x[j] * own);
        held[0][j] = grad.gk, held[1][j] = grad.gv;
        gw.x[j] += grad.gw;
        s.absorb(grow.get(j).grow(saved.shrink.get(j)), saved.gy.x[j], saved.y.x[j], counting.steps.x[j],
                 counting.origins.x[j] * origin);
        state.set(j, s);
      }
    }
  }

  GradLanes<T> state;
  if constexpr (!causal) tile.read_state(state, 0);
  Lanes<T> gk, gv;
  for (int t = 0; t < tile.length; ++t) {
    tile.will_write(t + kAhead, p.gk, p.gv);
    tile.read(k, p.k, t);
    tile.read_values(v, t);
    saved.read(p, tile, t);
    tile.read_decay(decay, t);
    tile.read_decay(grow, t + 1);
    const T origin = static_cast<T>(distances.origin(tile.first + t, 0));
    const T own = static_cast<T>(distances.own(tile.first + t, 0));
    const T far = static_cast<T>(distances.far(tile.first + t) - 1);
    const auto& held = after[t];
    for (int j = 0; j < kWidth; ++j) {
      const Scaled<T> key = exp_scaled(k.x[j]);
      TokenGrad<T> grad;
      grad.add_self(key, bonus.get(j), saved.shrink.get(j), saved.gy.x[j], v.x[j], saved.y.x[j], counting.origins.x[j] * far);
      if constexpr (!causal) {
        auto s = state.get(j);
        grad.add(s, decay.get(j), key, v.x[j], counting.origins.x[j] * own);
        s.absorb(grow.get(j).grow(saved.shrink.get(j)), saved.gy.x[j], saved.y.x[j], counting.steps.x[j],
                 counting.origins.x[j] * origin);
        state.set(j, s);
      }
      gk.x[j] = (grad.gk + held[0][j]) * lift;
      gv.x[j] = grad.gv + held[1][j];
      gw.x[j] += grad.gw;
      gu.x[j] += grad.gu;
    }
    store(p.gk + tile.offset(t), gk, tile.count);
    store(p.gv + tile.offset(t), gv, tile.count);
  }
  for (int j = 0; j < kWidth; ++j) gw.x[j] *= lift, gu.x[j] *= lift;
  tile.write_sums(p, gw, gu);
}

}  // namespace vrwkv
}  // namespace
