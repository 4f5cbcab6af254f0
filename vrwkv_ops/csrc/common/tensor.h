// ATen helpers that the operators share.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include "tensor_view.h"

namespace vrwkv_ops {

template <typename scalar_t>
View<scalar_t> view(const at::Tensor& x) {
  return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1), x.stride(2)};
}

// Returns null for an empty tensor.
template <typename scalar_t>
scalar_t* data_or_null(const at::Tensor& x) {
  return x.numel() ? x.mutable_data_ptr<scalar_t>() : nullptr;
}

// Sums (pieces, C) to (C,) in double and in a fixed order, so that the result is the same to the bit every time.
inline at::Tensor sum_partials(const at::Tensor& partials) {
  return at::sum(partials, {0}, false, at::kDouble).to(partials.scalar_type());
}

}  // namespace vrwkv_ops
