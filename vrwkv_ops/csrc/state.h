// The arithmetic of Bi-WKV states, shared by the CPU and the CUDA kernels.
//
// Every weight e^x is held as mantissa * 2^exponent with an integral exponent of unbounded range, so no weight overflows, and
// bringing two sums to a common exponent multiplies by powers of two, which rounds nothing: errors do not add up over T.
//
// A sequence is scanned in chunks. Within a chunk a state uses a frame that decays along with it: with t counted from the
// chunk's start, A_t e^(w t) = sum_{i<t} e^(k_i) e^(w (i+1)) v_i is a plain prefix sum (from the right likewise, with t counted
// from the chunk's end). The powers e^(w n) come from a table. Between chunks states are joined in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "platform.h"

// Internal linkage: every CPU instruction set compiles its own copy.
namespace {
namespace vrwkv {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// The exponent of an empty sum: below that of any weight, yet finite, so that no difference is NaN.
constexpr float kEmpty = -1e12f;
// Keys and decays beyond these bounds act as the bounds do; exponents stay far above kEmpty.
constexpr float kMaxKey = 1e8f;
constexpr float kMaxDecay = 1e6f;

VRWKV_FN float multiply_add(float a, float b, float c) {
#if VRWKV_HAS_FMA
  return ::fmaf(a, b, c);
#else
  return a * b + c;  // fmaf would be a library call here
#endif
}

VRWKV_FN double multiply_add(double a, double b, double c) {
#if VRWKV_HAS_FMA
  return ::fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <typename To, typename From>
VRWKV_FN To bit_cast(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// NaN passes through.
template <typename T>
VRWKV_FN T clamp(T x, T bound) {
  x = x > bound ? bound : x;
  return x < -bound ? -bound : x;
}

template <typename T>
VRWKV_FN T larger(T a, T b) {
  return a > b ? a : b;
}

// 2^n for an integral n; n outside [-126, 3] (double: [-1022, 3]) counts as the nearer end, NaN as either. Bounds are applied to
// the bits, as integers: compilers have one instruction for that, but not where NaN matters.
VRWKV_FN float power_of_two(float n) {
  // 2^23 + 127 + n has the bits of 127 + n, a biased exponent, at its low end; below 2^23 fewer, and negative ones below 0.
  constexpr int32_t kZero = 0x4b000000;
  int32_t bits = bit_cast<int32_t>(n + (8388608.f + 127.f));
  bits = bits < kZero + 1 ? kZero + 1 : bits;
  bits = bits > kZero + 130 ? kZero + 130 : bits;
  return bit_cast<float>(static_cast<uint32_t>(bits) << 23);
}

VRWKV_FN double power_of_two(double n) {
  constexpr int64_t kZero = 0x4330000000000000;
  int64_t bits = bit_cast<int64_t>(n + (4503599627370496. + 1023.));
  bits = bits < kZero + 1 ? kZero + 1 : bits;
  bits = bits > kZero + 1026 ? kZero + 1026 : bits;
  return bit_cast<double>(static_cast<uint64_t>(bits) << 52);
}

// 2^n for an integral n within the range of normal numbers.
VRWKV_FN float any_power_of_two(float n) { return bit_cast<float>(bit_cast<uint32_t>(n + (8388608.f + 127.f)) << 23); }

VRWKV_FN double any_power_of_two(double n) {
  return bit_cast<double>(bit_cast<uint64_t>(n + (4503599627370496. + 1023.)) << 52);
}

// mantissa * 2^exponent
template <typename T>
struct Scaled {
  T mantissa, exponent;
};

// e^x with a mantissa in [sqrt(1/2), sqrt(2)], within 2 ulp for |x| <= 1e5 however large e^x is.
VRWKV_FN Scaled<float> exp_scaled_unclamped(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  const float n = multiply_add(x, static_cast<float>(kLog2e), kRound) - kRound;
  // ln(2) in two parts, the first of 9 bits: n * 0.693359375 is exact.
  float r = multiply_add(n, -0.693359375f, x);
  r = multiply_add(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  return {multiply_add(p, r * r, r) + 1.f, n};
}

VRWKV_FN Scaled<double> exp_scaled_unclamped(double x) {
  constexpr double kRound = 6755399441055744.;  // 1.5 * 2^52
  const double n = multiply_add(x, kLog2e, kRound) - kRound;
  const double r = multiply_add(n, -1.9082149292705877e-10, multiply_add(n, -6.93147180369123816490e-01, x));
  return {::exp(r), n};
}

VRWKV_FN Scaled<float> exp_scaled(float x) { return exp_scaled_unclamped(clamp(x, kMaxKey)); }

VRWKV_FN Scaled<double> exp_scaled(double x) { return exp_scaled_unclamped(clamp(x, static_cast<double>(kMaxKey))); }

// log(mantissa * 2^exponent) for a normal mantissa > 0; NaN of NaN
VRWKV_FN float log_scaled(float mantissa, float exponent) {
  // mantissa = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)) and a polynomial in f, within 2 ulp
  const uint32_t offset = bit_cast<uint32_t>(mantissa) - 0x3f3504f3u;  // distance from sqrt(1/2)
  const float n = static_cast<float>(static_cast<int32_t>(offset) >> 23) + exponent;
  const float f = bit_cast<float>((offset & 0x007fffffu) + 0x3f3504f3u) - 1.f;
  const float square = f * f;
  float p = 7.0376836292e-2f;
  p = multiply_add(p, f, -1.1514610310e-1f);
  p = multiply_add(p, f, 1.1676998740e-1f);
  p = multiply_add(p, f, -1.2420140846e-1f);
  p = multiply_add(p, f, 1.4249322787e-1f);
  p = multiply_add(p, f, -1.6668057665e-1f);
  p = multiply_add(p, f, 2.0000714765e-1f);
  p = multiply_add(p, f, -2.4999993993e-1f);
  p = multiply_add(p, f, 3.3333331174e-1f);
  p = p * f * square;
  p = multiply_add(n, -2.12194440e-4f, p);
  p = multiply_add(-0.5f, square, p);
  return multiply_add(n, 0.693359375f, f + p) + (mantissa - mantissa);
}

VRWKV_FN double log_scaled(double mantissa, double exponent) { return multiply_add(exponent, kLn2, ::log(mantissa)); }

// A mantissa back in [sqrt(1/2), sqrt(2)] that has left it by less than a factor of 2.
template <typename T>
VRWKV_FN Scaled<T> normalised(Scaled<T> x) {
  const bool high = x.mantissa > T(1.4142135623730951), low = x.mantissa < T(0.70710678118654752);
  return {x.mantissa * (high ? T(0.5) : (low ? T(2) : T(1))), x.exponent + (high ? T(1) : (low ? T(-1) : T(0)))};
}

template <typename T>
VRWKV_FN Scaled<T> product(Scaled<T> a, Scaled<T> b) {
  return normalised<T>({a.mantissa * b.mantissa, a.exponent + b.exponent});
}

// A row of the table of e^(w n) for n = 0, 1, …: e^(w n) = power * 2^exponent and e^(-w n) = inverse * 2^-exponent.
template <typename T>
struct Decay {
  T power, inverse, exponent;

  VRWKV_FN Scaled<T> grow(Scaled<T> x) const { return {x.mantissa * power, x.exponent + exponent}; }
};

// Steps through e^(w n) in double, so that a table of hundreds of rows is good to float's last bit.
struct DecayPowers {
  Scaled<double> ratio, at = {1., 0.};

  VRWKV_FN explicit DecayPowers(double w) : ratio(exp_scaled(clamp(w, static_cast<double>(kMaxDecay)))) {}
  VRWKV_FN DecayPowers(Scaled<double> ratio_, Scaled<double> at_) : ratio(ratio_), at(at_) {}

  template <typename T>
  VRWKV_FN Decay<T> row() const {
    return {static_cast<T>(at.mantissa), static_cast<T>(1. / at.mantissa), static_cast<T>(at.exponent)};
  }
  VRWKV_FN void next() { at = product(at, ratio); }
};

// Forward: the weighted sum of values and of ones, (A, C) or (B, D) of paper equation 6, each times 2^exponent.
template <typename T>
struct WkvState {
  static constexpr int kFields = 3;
  T a = T(0), c = T(0), exponent = T(kEmpty);

  template <typename F>
  VRWKV_FN void for_each_field(F f) {
    f(a, 0), f(c, 1), f(exponent, 2);
  }

  VRWKV_FN void absorb(Scaled<T> weight, T v) {
    const T top = larger(exponent, weight.exponent);
    const T held = power_of_two(exponent - top);
    const T fresh = power_of_two(weight.exponent - top) * weight.mantissa;
    a = multiply_add(a, held, fresh * v);
    c = multiply_add(c, held, fresh);
    exponent = top;
  }

  // Multiplies by `factor` after `length` token steps.
  VRWKV_FN void advance(T factor, T /*length*/) { a *= factor, c *= factor; }
  VRWKV_FN void add(const WkvState& other, T factor) {
    a = multiply_add(factor, other.a, a);
    c = multiply_add(factor, other.c, c);
  }
};

// The gradient of w is -sum_t sum_i (d - o_t) a_ti gy_t (v_i - y_t), with distances d and weights a, for any origin o_t, since
// the same sum without (d - o_t) is 0. Where w decays, near tokens weigh most: o_t = 0. Where w grows, the farthest does, all d
// that matter are alike, and their sums would cancel: o_t is the distance to the farthest end of the sequence, far_t - 1, so
// that d - o_t = (t - far_t) - i for i < t, a part of t (`origin`, in the states) and a part of i (`own`, in the gradients).
template <typename N>
struct Distances {
  N tokens;
  bool causal;

  VRWKV_FN N far(N t) const { return causal || t > tokens - 1 - t ? t : tokens - 1 - t; }
  // In direction 1 sums run over t > i, in direction 0 over t < i.
  VRWKV_FN N origin(N t, int direction) const { return (direction == 1 ? t : tokens - 1 - t) - far(t); }
  VRWKV_FN N own(N i, int direction) const { return direction == 1 ? -i : i - (tokens - 1); }
};

// Which of the two a channel does, as factors: steps count where w decays, origins where it grows.
template <typename T>
struct Counting {
  T steps, origins;

  VRWKV_FN explicit Counting(T w) : steps(w < T(0) ? T(0) : T(1)), origins(w < T(0) ? T(1) : T(0)) {}
};

// Backward: sums of g_t = gy_t e^(-z_t) and h_t = g_t y_t, (P, Ph) or (Q, Qh), and the same weighted by distance, (R, Rh) or
// (S, Sh); all times 2^exponent, which follows e^(-z_t): g and h are signed.
template <typename T>
struct GradState {
  static constexpr int kFields = 5;
  T g = T(0), h = T(0), dg = T(0), dh = T(0), exponent = T(kEmpty);

  template <typename F>
  VRWKV_FN void for_each_field(F f) {
    f(g, 0), f(h, 1), f(dg, 2), f(dh, 3), f(exponent, 4);
  }

  VRWKV_FN void absorb(Scaled<T> weight, T gy, T y, T steps, T origin) {
    const T top = larger(exponent, weight.exponent);
    const T held = power_of_two(exponent - top);
    const T fresh = power_of_two(weight.exponent - top) * weight.mantissa * gy;
    dg = multiply_add(multiply_add(steps, g, dg), held, origin * fresh);
    dh = multiply_add(multiply_add(steps, h, dh), held, origin * fresh * y);
    g = multiply_add(g, held, fresh);
    h = multiply_add(h, held, fresh * y);
    exponent = top;
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

// What a number of tokens does to a state that passes them.
template <typename T>
struct Passage {
  Scaled<T> decay = {T(1), T(0)};  // e^(-w tokens)
  T tokens = T(0);

  static VRWKV_FN Passage of(T w, T n) { return {exp_scaled_unclamped(-clamp(w, static_cast<T>(kMaxDecay)) * n), n}; }
  VRWKV_FN void extend(const Passage& other) { decay = product(decay, other.decay), tokens += other.tokens; }
};

template <typename To, template <typename> class State, typename From>
VRWKV_FN State<To> convert(State<From> from) {
  State<To> to;
  To values[State<To>::kFields];
  from.for_each_field([&](From& x, int i) { values[i] = static_cast<To>(x); });
  to.for_each_field([&](To& x, int i) { x = values[i]; });
  return to;
}

// The state of all chunks so far, times frame: each chunk's frame is e^(-w length) away from the next, and a mantissa of its own
// keeps the exponent integral, so that joining takes powers of two only. Over a whole sequence T is double.
template <template <typename> class State, typename T>
struct Carry {
  State<T> state;
  T frame = T(1);

  // The state that enters the next chunk.
  VRWKV_FN State<T> enter() const {
    State<T> plain = state;
    plain.advance(frame, T(0));
    return plain;
  }

  // Joins what a chunk held on its own, in the frame of its start; `steps` is 1 where steps count (Counting), else 0.
  VRWKV_FN void append(const State<T>& chunk, const Passage<T>& passage, T steps) {
    add(chunk, T(1), passage.tokens * steps);
    decay(passage.decay);
  }

  // Joins what all chunks of the tokens passed held.
  VRWKV_FN void append(const Carry& chunks, const Passage<T>& passage, T steps) {
    decay(passage.decay);
    add(chunks.state, chunks.frame, passage.tokens * steps);
  }

 private:
  VRWKV_FN void add(const State<T>& other, T other_frame, T length) {
    const T top = larger(state.exponent, other.exponent);
    state.advance(power_of_two(state.exponent - top), length);
    state.add(other, power_of_two(other.exponent - top) * (other_frame / frame));
    state.exponent = top;
  }

  VRWKV_FN void decay(Scaled<T> by) {
    const Scaled<T> moved = product({frame, state.exponent}, by);
    // A state that is still empty stays so.
    const bool empty = !(state.exponent > T(kEmpty));
    frame = empty ? frame : moved.mantissa;
    state.exponent = empty ? state.exponent : moved.exponent;
  }
};

// One token's output (paper equation 7) from the sums before it, those after it, and itself.
template <typename T>
struct Output {
  T v, self, numerator, denominator, exponent;

  VRWKV_FN Output(Scaled<T> weight, T value)
      : v(value), self(weight.mantissa), numerator(self * v), denominator(self), exponent(weight.exponent) {}

  // `decay` takes the state from its chunk's frame to this token.
  VRWKV_FN void add(const WkvState<T>& state, Decay<T> decay) {
    const T other = state.exponent - decay.exponent;
    const T top = larger(exponent, other);
    const T held = power_of_two(exponent - top), fresh = power_of_two(other - top) * decay.inverse;
    numerator = multiply_add(numerator, held, fresh * state.a);
    denominator = multiply_add(denominator, held, fresh * state.c);
    self *= held;
    exponent = top;
  }

  // A token that only sees itself gets its very value, so that its gradients through the weights are 0.
  VRWKV_FN T y() const { return denominator == self ? v : numerator / denominator; }
};

// The gradients of one token: what the outputs on either side give to it, and its own output.
template <typename T>
struct TokenGrad {
  T gk = T(0), gv = T(0), gw = T(0), gu = T(0);

  VRWKV_FN void add(const GradState<T>& state, Decay<T> decay, Scaled<T> key, T v, T own) {
    // e^(k_i - z_t - w d) <= 1, with mantissas and a chunk's frame down to an eighth.
    const T e = power_of_two(state.exponent - decay.exponent + key.exponent) * decay.inverse * key.mantissa;
    const T part = e * (state.g * v - state.h);
    gv = multiply_add(e, state.g, gv);
    gk += part;
    gw -= multiply_add(own, part, e * (state.dg * v - state.dh));
  }

  // `far` is far_t - 1, or 0 where w decays.
  VRWKV_FN void add_self(Scaled<T> key, Scaled<T> bonus, Scaled<T> shrink, T gy, T v, T y, T far) {
    const T g =
        power_of_two(key.exponent + bonus.exponent + shrink.exponent) * key.mantissa * bonus.mantissa * shrink.mantissa * gy;
    const T part = g * (v - y);
    gv += g;
    gu += part;
    gk += part;
    gw = multiply_add(far, part, gw);
  }
};

}  // namespace vrwkv
}  // namespace
