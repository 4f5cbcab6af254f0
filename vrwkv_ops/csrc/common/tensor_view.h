// Read access to strided tensors, for the CPU and CUDA.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "compiler.h"

namespace vrwkv_ops {

VRWKV_FN constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// A (B, T, C) tensor with any strides.
template <typename scalar_t>
struct View {
  const scalar_t* data;
  int64_t batch_stride, token_stride, channel_stride;

  VRWKV_FN const scalar_t* row(int64_t b, int64_t t, int64_t c) const {
    return data + b * batch_stride + t * token_stride + c * channel_stride;
  }
};

}  // namespace vrwkv_ops
