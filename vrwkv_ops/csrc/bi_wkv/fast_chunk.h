// The fast path of Bi-WKV on the CPU, for float sums: all weights of a chunk share one exponent in each channel, and states
// follow the plain recurrences. A function returns false, and has written nothing, where the weights of a channel are too far
// apart for that; chunk.h then does the work.
#pragma once

#include "chunk.h"

namespace {
namespace vrwkv {

// The largest distance in bits between weights that share an exponent, and between an entering state and the chunk's weights.
constexpr float kMaxSpread = 32.f;

// e^x 2^shift for an integral shift; at least about 2^-126.
VRWKV_FN float weight_of(float x, float shift) {
  const Scaled<float> e = exp_scaled_unclamped(maximum(-kMaxKey, x));
  return e.mantissa * any_power_of_two(maximum(e.exponent + shift, -126.f));
}

// x e^(-w) + fresh, with e^(-w) in two floats: the rounding of one would grow with the number of steps.
struct Step {
  float high, low;

  VRWKV_FN float operator()(float x, float fresh) const { return multiply_add(x, high, multiply_add(x, low, fresh)); }
};

// LargestWeight of each lane.
struct LargestWeightVector {
  ChannelVector<float> high;

  VRWKV_FN LargestWeightVector() {
    for (int j = 0; j < kWidth; ++j) high.x[j] = -INFINITY;
  }
  VRWKV_FN LargestWeight get(int j, float w) const { return {w, high.x[j]}; }
  VRWKV_FN void absorb(int j, float w, float x) {
    LargestWeight largest = get(j, w);
    largest.absorb(x);
    high.x[j] = largest.high;
  }
};

// A block of channels and a chunk on the fast path.
template <typename scalar_t>
struct FastChunk {
  const Chunk<scalar_t>& chunk;
  bool fits = true;                                // whether the fast path applies
  ChannelVector<float> w, decay_high, decay_low;   // e^(-w) = decay_high + decay_low
  ChannelVector<float> growth, bonus, bonus_bits;  // growth: bits by which the chunk's tokens can grow a state; bonus: e^u
  ChannelVector<float> top;                        // weights are in units of 2^top

  VRWKV_FN explicit FastChunk(const Chunk<scalar_t>& of) : chunk(of) {
    load(w, chunk.problem.w + chunk.c, 1, chunk.count);
    load(bonus_bits, chunk.problem.u + chunk.c, 1, chunk.count);
    for (int j = 0; j < kWidth; ++j) {
      const Scaled<double> e = exp_scaled(-static_cast<double>(w.x[j]));
      const double decay = e.mantissa * any_power_of_two(maximum(e.exponent, -1022.));
      decay_high.x[j] = static_cast<float>(decay);
      decay_low.x[j] = static_cast<float>(decay - decay_high.x[j]);
      growth.x[j] = w.x[j] >= 0.f ? 0.f : 1.f - w.x[j] * (chunk.length * kLog2eFloat);
      bonus.x[j] = weight_of(bonus_bits.x[j], 0.f);
      bonus_bits.x[j] *= kLog2eFloat;
    }
    for (int j = 0; j < kWidth; ++j) fits &= growth.x[j] <= kMaxSpread;
  }

  VRWKV_FN Step step(int j) const { return {decay_high.x[j], decay_low.x[j]}; }

  // Sets `top` to the largest of the weights e^x. `read(x, t)` reads the x of a token.
  template <typename Read>
  VRWKV_FN void set_top(const Read& read) {
    ChannelVector<float> high, low, x;
    for (int j = 0; j < kWidth; ++j) high.x[j] = -INFINITY, low.x[j] = INFINITY;
    for (int t = 0; t < chunk.length; ++t) {
      read(x, t);
      for (int j = 0; j < kWidth; ++j) {
        Range range{high.x[j], low.x[j]};
        range.include(x.x[j]);
        high.x[j] = range.high, low.x[j] = range.low;
      }
    }
    for (int j = 0; j < kWidth; ++j) {
      const Range range{high.x[j], low.x[j]};
      top.x[j] = range.top();
      fits &= range.spread() + std::fabs(bonus_bits.x[j]) <= kMaxSpread && std::fabs(top.x[j]) <= kMaxTop;
    }
  }

  // Brings the states that enter from both sides, and `top`, to the largest exponent of all, growth included: sums of large
  // values stay finite. A state that vanishes beside another, below 2^-126, is still below float precision after growth and
  // times any key and bonus.
  template <typename State>
  VRWKV_FN void enter(StateVector<State, float>& left, StateVector<State, float>& right) {
    constexpr int kExponent = State::kFields - 1;
    for (int j = 0; j < kWidth; ++j) {
      const float entering = maximum(left.field[kExponent][j], right.field[kExponent][j]) + growth.x[j];
      fits &= entering - top.x[j] <= kMaxSpread;
      top.x[j] = std::ceil(maximum(top.x[j], entering));
      for (auto* state : {&left, &right}) {
        State s = state->get(j);
        s.advance(power_of_two(s.exponent - top.x[j]), 0.f);
        state->set(j, s);
      }
    }
  }

  // Writes a state of the chunk alone.
  template <typename State>
  VRWKV_FN void write_state(StateVector<State, float>& state, const LargestWeightVector& largest, int direction) const {
    for (int j = 0; j < kWidth; ++j) {
      State s = state.get(j);
      s.exponent = top.x[j];
      largest.get(j, w.x[j]).rescale_to_largest(s);
      // chunk.h keeps states in the frame of the chunk's start.
      const Decay<float> by = Decay<float>::of(w.x[j], chunk.length);
      s.advance(by.power, 0.f);
      s.exponent += by.exponent;
      state.set(j, s);
    }
    chunk.write_state(state, direction);
  }
};

template <typename scalar_t>
VRWKV_FN FastChunk<scalar_t> make_fast_chunk(const WkvForwardParams<scalar_t>& p, const Chunk<scalar_t>& chunk) {
  FastChunk<scalar_t> fast(chunk);
  fast.set_top([&](ChannelVector<float>& x, int t) VRWKV_INLINE_LAMBDA {
    chunk.prefetch_inputs(t + kPrefetchTokens, p.k, p.v);
    chunk.read(x, p.k, t);
  });
  // No weight exceeds 1, after growth and with the bonus included.
  for (int j = 0; j < kWidth; ++j) fast.top.x[j] += std::ceil(fast.growth.x[j] + maximum(fast.bonus_bits.x[j], 0.f));
  return fast;
}

template <bool causal, typename scalar_t>
VRWKV_FN bool fast_states(const WkvForwardParams<scalar_t>& p, const Chunk<scalar_t>& chunk) {
  const auto fast = make_fast_chunk(p, chunk);
  if (!fast.fits) return false;
  alignas(kAlignment) float weights[kMaxChunk][kWidth];
  ChannelVector<float> k, v;
  for (int direction = 0; direction < (causal ? 1 : 2); ++direction) {
    WkvStateVector<float> state;
    LargestWeightVector largest;
    for (int i = 0; i < chunk.length; ++i) {
      const int t = direction == 0 ? i : chunk.length - 1 - i;
      chunk.read(k, p.k, t);
      chunk.read_values(v, t);
      if (direction == 0) {
        for (int j = 0; j < kWidth; ++j) weights[t][j] = weight_of(k.x[j], -fast.top.x[j]);
      }
      for (int j = 0; j < kWidth; ++j) {
        auto s = state.get(j);
        s.absorb(fast.step(j), weights[t][j], v.x[j]);
        state.set(j, s);
        largest.absorb(j, fast.w.x[j], k.x[j]);
      }
    }
    fast.write_state(state, largest, direction);
  }
  return true;
}

template <bool causal, typename scalar_t>
VRWKV_FN bool fast_outputs(const WkvForwardParams<scalar_t>& p, const Chunk<scalar_t>& chunk) {
  auto fast = make_fast_chunk(p, chunk);
  WkvStateVector<float> left, right;
  chunk.read_state(left, 0);
  if constexpr (!causal) chunk.read_state(right, 1);
  fast.enter(left, right);
  if (!fast.fits) return false;

  const float lift = 1.f / p.headroom;
  ChannelVector<float> k, v, y, denominator;
  // The state to the right of each token; every element is written before it is read.
  alignas(kAlignment) float weights[kMaxChunk][kWidth], after[causal ? 1 : kMaxChunk][2][kWidth];
  for (int t = chunk.length - 1; t >= 0; --t) {
    chunk.read(k, p.k, t);
    for (int j = 0; j < kWidth; ++j) weights[t][j] = weight_of(k.x[j], -fast.top.x[j]);
    if constexpr (causal) continue;
    chunk.read_values(v, t);
    for (int j = 0; j < kWidth; ++j) {
      auto s = right.get(j);
      after[causal ? 0 : t][0][j] = s.a, after[causal ? 0 : t][1][j] = s.c;
      s.absorb(fast.step(j), weights[t][j], v.x[j]);
      right.set(j, s);
    }
  }
  for (int t = 0; t < chunk.length; ++t) {
    chunk.prefetch_outputs(t + kPrefetchTokens, p.y);
    if (p.z) chunk.prefetch_outputs(t + kPrefetchTokens, p.z);
    chunk.read_values(v, t);
    for (int j = 0; j < kWidth; ++j) {
      auto s = left.get(j);
      const float self = weights[t][j] * fast.bonus.x[j];
      float numerator = multiply_add(self, v.x[j], s.a);
      denominator.x[j] = self + s.c;
      if constexpr (!causal) numerator += after[t][0][j], denominator.x[j] += after[t][1][j];
      // The output of a token that sees only itself is exactly its value, as in Output.
      y.x[j] = (denominator.x[j] == self ? v.x[j] : numerator / denominator.x[j]) * lift;
      s.absorb(fast.step(j), weights[t][j], v.x[j]);
      left.set(j, s);
    }
    write_output(p, chunk, t, y, denominator, fast.top);
  }
  return true;
}

template <typename scalar_t>
VRWKV_FN FastChunk<scalar_t> make_fast_chunk(const WkvBackwardParams<scalar_t>& p, const Chunk<scalar_t>& chunk) {
  FastChunk<scalar_t> fast(chunk);
  fast.set_top([&](ChannelVector<float>& x, int t) VRWKV_INLINE_LAMBDA {
    SavedToken<scalar_t>::prefetch_inputs(p, chunk, t + kPrefetchTokens);
    load(x, p.z + chunk.offset(t), 1, chunk.count);
    for (int j = 0; j < kWidth; ++j) x.x[j] = -x.x[j];
  });
  return fast;
}

template <bool causal, typename scalar_t>
VRWKV_FN bool fast_states(const WkvBackwardParams<scalar_t>& p, const Chunk<scalar_t>& chunk) {
  const auto fast = make_fast_chunk(p, chunk);
  if (!fast.fits) return false;
  const Distances<int64_t> distances{p.tokens, causal};
  const DistanceFactorsVector<float> counting(chunk);
  SavedToken<scalar_t> saved;
  constexpr int kFirst = causal ? 1 : 0;
  alignas(kAlignment) float gs[kMaxChunk][kWidth];
  for (int direction = kFirst; direction < 2; ++direction) {
    GradStateVector<float> state;
    LargestWeightVector largest;
    for (int i = 0; i < chunk.length; ++i) {
      const int t = direction == 0 ? i : chunk.length - 1 - i;
      saved.read(p, chunk, t);
      const float origin = static_cast<float>(distances.origin(chunk.first + t, direction));
      if (direction == kFirst) {
        for (int j = 0; j < kWidth; ++j) gs[t][j] = weight_of(-saved.z.x[j], -fast.top.x[j]) * saved.gy.x[j];
      }
      for (int j = 0; j < kWidth; ++j) {
        auto s = state.get(j);
        s.absorb(fast.step(j), gs[t][j], gs[t][j] * saved.y.x[j], counting.steps.x[j], counting.origins.x[j] * origin);
        state.set(j, s);
        largest.absorb(j, fast.w.x[j], -saved.z.x[j]);
      }
    }
    fast.write_state(state, largest, direction);
  }
  return true;
}

// The weight e^(k + u - z) of a token in its own output is at most 1, so that no key exceeds the range of the e^(-z).
template <bool causal, typename scalar_t>
VRWKV_FN bool fast_outputs(const WkvBackwardParams<scalar_t>& p, const Chunk<scalar_t>& chunk) {
  auto fast = make_fast_chunk(p, chunk);
  GradStateVector<float> left, right;
  chunk.read_state(right, 1);
  if constexpr (!causal) chunk.read_state(left, 0);
  fast.enter(left, right);
  if (!fast.fits) return false;

  const float lift = 1.f / p.headroom;
  const Distances<int64_t> distances{p.tokens, causal};
  const DistanceFactorsVector<float> counting(chunk);
  SavedToken<scalar_t> saved;
  ChannelVector<float> k, v, gk, gv, gw, gu;
  // The weights of keys, g, and the parts of gk and gv from the outputs after each token.
  alignas(kAlignment) float keys[kMaxChunk][kWidth], gs[kMaxChunk][kWidth], after[kMaxChunk][2][kWidth];
  for (int t = chunk.length - 1; t >= 0; --t) {
    chunk.prefetch_inputs(t - kPrefetchTokens, p.k, p.v);
    chunk.read(k, p.k, t);
    chunk.read_values(v, t);
    saved.read(p, chunk, t);
    const float origin = static_cast<float>(distances.origin(chunk.first + t, 1));
    const float own = static_cast<float>(distances.own(chunk.first + t, 1));
    for (int j = 0; j < kWidth; ++j) {
      auto s = right.get(j);
      const float key = weight_of(k.x[j], fast.top.x[j]), g = weight_of(-saved.z.x[j], -fast.top.x[j]) * saved.gy.x[j];
      keys[t][j] = key, gs[t][j] = g;
      TokenGrad<float> grad;
      grad.add(s, key, v.x[j], counting.origins.x[j] * own);
      after[t][0][j] = grad.gk, after[t][1][j] = grad.gv;
      gw.x[j] += grad.gw;
      s.absorb(fast.step(j), g, g * saved.y.x[j], counting.steps.x[j], counting.origins.x[j] * origin);
      right.set(j, s);
    }
  }
  for (int t = 0; t < chunk.length; ++t) {
    chunk.prefetch_outputs(t + kPrefetchTokens, p.gk, p.gv);
    chunk.read_values(v, t);
    saved.read(p, chunk, t);
    const float origin = static_cast<float>(distances.origin(chunk.first + t, 0));
    const float own = static_cast<float>(distances.own(chunk.first + t, 0));
    const float far = static_cast<float>(distances.far(chunk.first + t) - 1);
    for (int j = 0; j < kWidth; ++j) {
      const float key = keys[t][j], g = gs[t][j];
      TokenGrad<float> grad;
      grad.add_self(key * fast.bonus.x[j] * g, v.x[j], saved.y.x[j], counting.origins.x[j] * far);
      if constexpr (!causal) {
        auto s = left.get(j);
        grad.add(s, key, v.x[j], counting.origins.x[j] * own);
        s.absorb(fast.step(j), g, g * saved.y.x[j], counting.steps.x[j], counting.origins.x[j] * origin);
        left.set(j, s);
      }
      gk.x[j] = (grad.gk + after[t][0][j]) * lift;
      gv.x[j] = grad.gv + after[t][1][j];
      gw.x[j] += grad.gw;
      gu.x[j] += grad.gu;
    }
    store(p.gk + chunk.offset(t), gk, chunk.count);
    store(p.gv + chunk.offset(t), gv, chunk.count);
  }
  for (int j = 0; j < kWidth; ++j) gw.x[j] *= lift, gu.x[j] *= lift;
  chunk.write_sums(p, gw, gu);
  return true;
}

}  // namespace vrwkv
}  // namespace
