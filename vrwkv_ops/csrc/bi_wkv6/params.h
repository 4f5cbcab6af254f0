// Arguments of the bi_wkv6 kernels.
#pragma once

#include <cstdint>

#include "../common/tensor_view.h"

namespace vrwkv_ops {

constexpr int64_t kMaxHeadSize = 64;

// Inputs of shape (B, T, H N) and the bonus u (H, N).
template <typename scalar_t>
struct Wkv6Inputs {
  using T = acc_type<scalar_t>;
  View<scalar_t> r, k, v;
  View<T> w;
  const T* u;                          // contiguous
  int64_t batch, tokens, heads, size;  // size: channels of a head, N
  bool causal;
};

template <typename scalar_t>
struct Wkv6ForwardParams : Wkv6Inputs<scalar_t> {
  scalar_t* y;  // contiguous
};

template <typename scalar_t>
struct Wkv6BackwardParams : Wkv6Inputs<scalar_t> {
  using T = acc_type<scalar_t>;
  View<scalar_t> gy;
  scalar_t *gr, *gk, *gv;  // contiguous
  T* gw;
  T* gu;  // (B, C): one row for each image
};

}  // namespace vrwkv_ops
