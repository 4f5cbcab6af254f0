// The parameters of the element-wise kernels.
#pragma once

#include "../common/tensor_view.h"

namespace vrwkv_ops {

enum PointwiseFunction { kSquaredRelu, kSquaredReluBackward, kSigmoidGate, kSigmoidGateBackward, kPointwiseFunctions };

// Contiguous tensors of one size, as many as the function has.
template <typename scalar_t>
struct PointwiseParams {
  const scalar_t* in[3];
  scalar_t* out[2];
};

}  // namespace vrwkv_ops
