// Element-wise functions of the layers and their gradients, for the CPU and CUDA.
#pragma once

#include "../common/scaled.h"
#include "../common/vector.h"
#include "params.h"

namespace {
namespace vrwkv {

using vrwkv_ops::PointwiseParams;

// relu(x)^2
struct SquaredRelu {
  static constexpr int kInputs = 1, kOutputs = 1;
  template <typename T>
  static VRWKV_FN void apply(const T (&in)[1], T (&out)[1]) {
    const T square = in[0] * in[0];
    out[0] = in[0] < T(0) ? T(0) : square;  // NaN passes through
  }
};

// The gradient of x, from the gradient of the result and x.
struct SquaredReluBackward {
  static constexpr int kInputs = 2, kOutputs = 1;
  template <typename T>
  static VRWKV_FN void apply(const T (&in)[2], T (&out)[1]) {
    const T slope = in[0] * (in[1] + in[1]);
    out[0] = in[1] < T(0) ? T(0) : slope;
  }
};

// sigmoid(r) and sigmoid(-r) without a subtraction: 1 / (1 + e^-r) and e^-r / (1 + e^-r).
template <typename T>
struct Sigmoids {
  T plus, minus;

  VRWKV_FN explicit Sigmoids(T r) {
    // e^r and e^-r are normal numbers up to here. Beyond, a sigmoid differs from 0 or 1 by less than 2e-37 (double: 1e-304).
    constexpr T kBound = std::is_same_v<T, float> ? 85 : 700;
    const Scaled<T> e = exp_scaled_unclamped(clamp(-r, kBound));
    const T weight = any_power_of_two(e.exponent) * e.mantissa;
    plus = T(1) / (T(1) + weight);
    minus = weight * plus;
  }
};

// sigmoid(r) * x
struct SigmoidGate {
  static constexpr int kInputs = 2, kOutputs = 1;
  template <typename T>
  static VRWKV_FN void apply(const T (&in)[2], T (&out)[1]) {
    out[0] = Sigmoids<T>(in[0]).plus * in[1];
  }
};

// The gradients of r and x, from the gradient of the result, r and x.
struct SigmoidGateBackward {
  static constexpr int kInputs = 3, kOutputs = 2;
  template <typename T>
  static VRWKV_FN void apply(const T (&in)[3], T (&out)[2]) {
    const Sigmoids<T> gate(in[1]);
    out[1] = in[0] * gate.plus;
    out[0] = out[1] * in[2] * gate.minus;
  }
};

// Computes elements i to i + count, at most kLanes.
template <typename Function, int kLanes, typename scalar_t>
VRWKV_FN void pointwise(const PointwiseParams<scalar_t>& p, int64_t i, int count) {
  using T = vrwkv_ops::acc_type<scalar_t>;
  Vector<T, kLanes> in[Function::kInputs], out[Function::kOutputs];
  for (int n = 0; n < Function::kInputs; ++n) load(in[n], p.in[n] + i, 1, count);
  for (int j = 0; j < kLanes; ++j) {
    T from[Function::kInputs], to[Function::kOutputs];
    for (int n = 0; n < Function::kInputs; ++n) from[n] = in[n].x[j];
    Function::apply(from, to);
    for (int n = 0; n < Function::kOutputs; ++n) out[n].x[j] = to[n];
  }
  for (int n = 0; n < Function::kOutputs; ++n) store(p.out[n] + i, out[n], count);
}

}  // namespace vrwkv
}  // namespace
