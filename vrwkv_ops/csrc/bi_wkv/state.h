// The arithmetic of Bi-WKV states, shared by the CPU and the CUDA kernels (docs/operator.md).
//
// A weight e^x is stored as mantissa * 2^exponent with an integral exponent of unbounded range, so no weight overflows.
// Bringing two sums to a common exponent multiplies by powers of two, which is exact: rounding errors do not accumulate over T.
//
// A sequence is scanned in chunks. Within a chunk a state is stored in a frame that decays along with it: with t counted from
// the start of the chunk, A_t e^(w t) = sum_{i<t} e^(k_i) e^(w (i+1)) v_i is a plain prefix sum. From the right, t counts from
// the end of the chunk. The states of chunks are joined in double.
#pragma once

#include "../common/scaled.h"

// Internal linkage: every CPU instruction set compiles its own copy.
namespace {
namespace vrwkv {

// e^(w n) = power * 2^exponent and e^(-w n) = inverse * 2^-exponent, correct to the last bit in float for any n.
template <typename T>
struct Decay {
  T power, inverse, exponent;

  VRWKV_FN Scaled<T> grow(Scaled<T> x) const { return {x.mantissa * power, x.exponent + exponent}; }
  static VRWKV_FN Decay of(double w, double n) {
    const auto x = exp_scaled_unclamped(clamp(w, static_cast<double>(kMaxDecay)) * n);
    return {static_cast<T>(x.mantissa), static_cast<T>(1. / x.mantissa), static_cast<T>(x.exponent)};
  }
};

// The state of the forward pass: weighted sums of values and of ones, (A, C) or (B, D) of paper equation 6, times 2^exponent.
template <typename T>
struct WkvState {
  static constexpr int kFields = 3;
  T a = T(0), c = T(0), exponent = T(kEmpty);

  template <typename F>
  VRWKV_FN void for_each_field(F f) {
    f(a, 0), f(c, 1), f(exponent, 2);
  }

  VRWKV_FN void absorb(Scaled<T> weight, T v) {
    const T top = maximum(exponent, weight.exponent);
    const T held = power_of_two(exponent - top);
    const T fresh = power_of_two(weight.exponent - top) * weight.mantissa;
    a = multiply_add(a, held, fresh * v);
    c = multiply_add(c, held, fresh);
    exponent = top;
  }
  // The same with a weight in units of 2^exponent, in a state that step(x, fresh) = x e^(-w) + fresh decays.
  template <typename Step>
  VRWKV_FN void absorb(const Step& step, T weight, T v) {
    a = step(a, weight * v);
    c = step(c, weight);
  }

  // Multiplies by `factor` after `length` token steps.
  VRWKV_FN void advance(T factor, T /*length*/) { a *= factor, c *= factor; }
  VRWKV_FN void add(const WkvState& other, T factor) {
    a = multiply_add(factor, other.a, a);
    c = multiply_add(factor, other.c, c);
  }
};

// The gradient of w is -sum_t sum_i (d - o_t) a_ti gy_t (v_i - y_t), with distances d and weights a. The origin o_t is free,
// because the same sum without (d - o_t) is 0. For w >= 0 near tokens weigh most, and o_t = 0. For w < 0 the farthest token
// weighs most, all d that matter are nearly equal, and sums of them would cancel: o_t is the distance to the farther end of the
// sequence, far_t - 1. Then d - o_t = (t - far_t) - i for i < t, the sum of a part of t (`origin`, in the states) and one of i
// (`own`, in the gradients).
template <typename N>
struct Distances {
  N tokens;
  bool causal;

  VRWKV_FN N far(N t) const { return causal || t > tokens - 1 - t ? t : tokens - 1 - t; }
  // Sums run over t > i in direction 1 and over t < i in direction 0.
  VRWKV_FN N origin(N t, int direction) const { return (direction == 1 ? t : tokens - 1 - t) - far(t); }
  VRWKV_FN N own(N i, int direction) const { return direction == 1 ? -i : i - (tokens - 1); }
};

// Factors of 0 or 1 that choose between the two cases of Distances for a channel: steps is 1 for w >= 0, origins for w < 0.
template <typename T>
struct DistanceFactors {
  T steps, origins;

  VRWKV_FN explicit DistanceFactors(T w) : steps(w < T(0) ? T(0) : T(1)), origins(w < T(0) ? T(1) : T(0)) {}
};

// The state of the backward pass: sums of g_t = gy_t e^(-z_t) and h_t = g_t y_t, (P, Ph) or (Q, Qh), and the same weighted by
// distance, (R, Rh) or (S, Sh), all times 2^exponent. The exponent is that of e^(-z_t), because g and h are signed.
template <typename T>
struct GradState {
  static constexpr int kFields = 5;
  T g = T(0), h = T(0), dg = T(0), dh = T(0), exponent = T(kEmpty);

  template <typename F>
  VRWKV_FN void for_each_field(F f) {
    f(g, 0), f(h, 1), f(dg, 2), f(dh, 3), f(exponent, 4);
  }

  VRWKV_FN void absorb(Scaled<T> weight, T gy, T y, T steps, T origin) {
    const T top = maximum(exponent, weight.exponent);
    const T held = power_of_two(exponent - top);
    const T fresh = power_of_two(weight.exponent - top) * weight.mantissa * gy;
    dg = multiply_add(multiply_add(steps, g, dg), held, origin * fresh);
    dh = multiply_add(multiply_add(steps, h, dh), held, origin * fresh * y);
    g = multiply_add(g, held, fresh);
    h = multiply_add(h, held, fresh * y);
    exponent = top;
  }
  // The same with g_t = `fresh` and h_t = `fresh_h` in units of 2^exponent, in a state that step(x, fresh) = x e^(-w) + fresh
  // decays.
  template <typename Step>
  VRWKV_FN void absorb(const Step& step, T fresh, T fresh_h, T steps, T origin) {
    dg = step(multiply_add(steps, g, dg), origin * fresh);
    dh = step(multiply_add(steps, h, dh), origin * fresh_h);
    g = step(g, fresh);
    h = step(h, fresh_h);
  }

  VRWKV_FN void advance(T factor, T length) {
    dg = multiply_add(length, g, dg) * factor;
    dh = multiply_add(length, h, dh) * factor;
    g *= factor, h *= factor;
  }
  VRWKV_FN void add(const GradState& other, T factor) {
    g = multiply_add(factor, other.g, g);
    h = multiply_add(factor, other.h, h);
    dg = multiply_add(factor, other.dg, dg);
    dh = multiply_add(factor, other.dh, dh);
  }
};

// The fast paths, on the CPU and on CUDA, have all weights of a chunk share an exponent of at most this size.
constexpr float kMaxTop = 65536.f;

// The largest and the smallest of some numbers; NaN is ignored.
struct Range {
  float high = -INFINITY, low = INFINITY;

  VRWKV_FN void include(float x) { high = maximum(x, high), low = minimum(x, low); }
  // In bits.
  VRWKV_FN float spread() const { return (high - low) * kLog2eFloat; }
  VRWKV_FN float top() const { return ::ceilf(high * kLog2eFloat); }
};

// The largest weight in a state, e^(x - w d). Its exponent becomes the exponent of the state: with a larger one other states
// would vanish beside it, and TokenGrad requires none larger.
struct LargestWeight {
  float w, high = -INFINITY;

  VRWKV_FN void absorb(float x) { high = maximum(x, high - w); }
  // Changes the exponent of the state.
  template <typename State>
  VRWKV_FN void rescale_to_largest(State& s) const {
    const float top = ::ceilf(high * kLog2eFloat);
    s.advance(any_power_of_two(s.exponent - top), 0.f);
    s.exponent = top;
  }
};

// The effect of a number of tokens on a state that passes them.
template <typename T>
struct TokenSpan {
  Scaled<T> decay = {T(1), T(0)};  // e^(-w tokens)
  T tokens = T(0);

  static VRWKV_FN TokenSpan of(T w, T n) { return {exp_scaled_unclamped(-clamp(w, static_cast<T>(kMaxDecay)) * n), n}; }
  VRWKV_FN void extend(const TokenSpan& other) { decay = product(decay, other.decay), tokens += other.tokens; }
};

template <typename To, template <typename> class State, typename From>
VRWKV_FN State<To> convert(State<From> from) {
  State<To> to;
  To values[State<To>::kFields];
  from.for_each_field([&](From& x, int i) { values[i] = static_cast<To>(x); });
  to.for_each_field([&](To& x, int i) { x = values[i]; });
  return to;
}

// The joint state of all chunks so far, times `frame`. Frames of neighbouring chunks differ by e^(-w length); the separate
// mantissa `frame` keeps the exponent integral, so that joining multiplies by powers of two only. T is double for a whole
// sequence.
template <template <typename> class State, typename T>
struct PrefixState {
  State<T> state;
  T frame = T(1);

  // Returns the state that enters the next chunk.
  VRWKV_FN State<T> entering() const {
    State<T> plain = state;
    plain.advance(frame, T(0));
    return plain;
  }

  // Appends a chunk's own state, in the frame of its start; `steps` is from DistanceFactors.
  VRWKV_FN void append(const State<T>& chunk, const TokenSpan<T>& passage, T steps) {
    add(chunk, T(1), passage.tokens * steps);
    decay(passage.decay);
  }

  // Appends the joint state of several chunks.
  VRWKV_FN void append(const PrefixState& chunks, const TokenSpan<T>& passage, T steps) {
    decay(passage.decay);
    add(chunks.state, chunks.frame, passage.tokens * steps);
  }

 private:
  VRWKV_FN void add(const State<T>& other, T other_frame, T length) {
    const T top = maximum(state.exponent, other.exponent);
    state.advance(power_of_two(state.exponent - top), length);
    state.add(other, power_of_two(other.exponent - top) * (other_frame / frame));
    state.exponent = top;
  }

  VRWKV_FN void decay(Scaled<T> by) {
    const Scaled<T> moved = product({frame, state.exponent}, by);
    // An empty state stays empty.
    const bool empty = !(state.exponent > T(kEmpty));
    frame = empty ? frame : moved.mantissa;
    state.exponent = empty ? state.exponent : moved.exponent;
  }
};

// The output of one token (paper equation 7) from the sums before it, the sums after it, and the token itself.
template <typename T>
struct Output {
  T v, self, numerator, denominator, exponent;

  VRWKV_FN Output(Scaled<T> weight, T value)
      : v(value), self(weight.mantissa), numerator(self * v), denominator(self), exponent(weight.exponent) {}

  // `decay` takes the state from its chunk's frame to this token.
  VRWKV_FN void add(const WkvState<T>& state, Decay<T> decay) {
    const T other = state.exponent - decay.exponent;
    const T top = maximum(exponent, other);
    const T held = power_of_two(exponent - top), fresh = power_of_two(other - top) * decay.inverse;
    numerator = multiply_add(numerator, held, fresh * state.a);
    denominator = multiply_add(denominator, held, fresh * state.c);
    self *= held;
    exponent = top;
  }

  // The output of a token that sees only itself is exactly its value, so that its gradients through the weights are 0.
  VRWKV_FN T y() const { return denominator == self ? v : numerator / denominator; }
};

// The gradients of one token, from the outputs on both sides and from its own output.
template <typename T>
struct TokenGrad {
  T gk = T(0), gv = T(0), gw = T(0), gu = T(0);

  VRWKV_FN void add(const GradState<T>& state, Decay<T> decay, Scaled<T> key, T v, T own) {
    // e^(k_i - z_t - w d) <= 1; with mantissas and the frame of a chunk the power of two is at most 8.
    add(state, power_of_two(state.exponent - decay.exponent + key.exponent) * decay.inverse * key.mantissa, v, own);
  }
  // `e` is the key's weight times 2^exponent of the state.
  VRWKV_FN void add(const GradState<T>& state, T e, T v, T own) {
    const T part = e * (state.g * v - state.h);
    gv = multiply_add(e, state.g, gv);
    gk += part;
    gw -= multiply_add(own, part, e * (state.dg * v - state.dh));
  }

  // `far` is far_t - 1, or 0 for w >= 0.
  VRWKV_FN void add_self(Scaled<T> key, Scaled<T> bonus, Scaled<T> shrink, T gy, T v, T y, T far) {
    add_self(
        power_of_two(key.exponent + bonus.exponent + shrink.exponent) * key.mantissa * bonus.mantissa * shrink.mantissa * gy, v,
        y, far);
  }
  // `g` is gy times the token's own weight in its output.
  VRWKV_FN void add_self(T g, T v, T y, T far) {
    const T part = g * (v - y);
    gv += g;
    gu += part;
    gk += part;
    gw = multiply_add(far, part, gw);
  }
};

}  // namespace vrwkv
}  // namespace
