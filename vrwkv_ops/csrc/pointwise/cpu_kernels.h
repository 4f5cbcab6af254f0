// The element-wise kernels of one CPU instruction set, as cpu.cpp calls them.
#pragma once

#include "../common/cpu_isa.h"
#include "params.h"

namespace vrwkv_cpu {

using vrwkv_ops::PointwiseParams;

// Kernels for the elements from `begin` to `end`, by function.
template <typename scalar_t>
struct PointwiseKernels {
  void (*functions[vrwkv_ops::kPointwiseFunctions])(const PointwiseParams<scalar_t>&, int64_t begin, int64_t end);
};

}  // namespace vrwkv_cpu
