// Floating-point helpers and numbers with an exponent of unbounded range, shared by the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "compiler.h"

// Internal linkage: every CPU instruction set compiles its own copy.
namespace {
namespace vrwkv {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// The exponent of an empty sum: below the exponent of any weight, but finite, so that no difference is NaN.
constexpr float kEmpty = -1e12f;
// Keys and decays are clamped to these bounds, which keeps exponents far above kEmpty.
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

constexpr float kLog2eFloat = static_cast<float>(kLog2e);

// NaN passes through.
template <typename T>
VRWKV_FN T clamp(T x, T bound) {
  x = x > bound ? bound : x;
  return x < -bound ? -bound : x;
}

// b if one of them is NaN, like the SIMD instruction.
template <typename T>
VRWKV_FN T maximum(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
VRWKV_FN T minimum(T a, T b) {
  return a < b ? a : b;
}

// 2^n for an integral n, which is clamped to [-126, 3] (double: [-1022, 3]); NaN gives one of the ends. The bits are clamped as
// integers, for which there is one instruction.
VRWKV_FN float power_of_two(float n) {
  // The low bits of 2^23 + 127 + n are 127 + n, the biased exponent.
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

// e^x with a mantissa in [sqrt(1/2), sqrt(2)], within 2 ulp for |x| <= 1e5.
VRWKV_FN Scaled<float> exp_scaled_unclamped(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
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
  // The Taylor polynomial of degree 13, within 1 ulp; unlike a library's function it becomes SIMD code.
  double p = 1.;
  for (int i = 13; i > 0; --i) p = multiply_add(p, r * (1. / i), 1.);
  return {p, n};
}

VRWKV_FN Scaled<float> exp_scaled(float x) { return exp_scaled_unclamped(clamp(x, kMaxKey)); }

VRWKV_FN Scaled<double> exp_scaled(double x) { return exp_scaled_unclamped(clamp(x, static_cast<double>(kMaxKey))); }

// log(mantissa * 2^exponent) for a normal mantissa > 0; NaN gives NaN.
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

// Brings a mantissa back to [sqrt(1/2), sqrt(2)] that is outside by less than a factor of 2.
template <typename T>
VRWKV_FN Scaled<T> normalised(Scaled<T> x) {
  const bool high = x.mantissa > T(1.4142135623730951), low = x.mantissa < T(0.70710678118654752);
  return {x.mantissa * (high ? T(0.5) : (low ? T(2) : T(1))), x.exponent + (high ? T(1) : (low ? T(-1) : T(0)))};
}

template <typename T>
VRWKV_FN Scaled<T> product(Scaled<T> a, Scaled<T> b) {
  return normalised<T>({a.mantissa * b.mantissa, a.exponent + b.exponent});
}

}  // namespace vrwkv
}  // namespace
