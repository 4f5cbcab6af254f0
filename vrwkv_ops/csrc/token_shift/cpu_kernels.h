// The token shift kernels of one CPU instruction set, as cpu.cpp calls them.
#pragma once

#include "../common/cpu_isa.h"
#include "params.h"

namespace vrwkv_cpu {

using vrwkv_ops::TokenShiftBackwardParams;
using vrwkv_ops::TokenShiftForwardParams;

// The arrays are indexed by the number of mixes minus one.
template <typename scalar_t>
struct TokenShiftKernels {
  void (*forward[vrwkv_ops::kMaxMixes])(const TokenShiftForwardParams<scalar_t>&, int64_t first_row, int64_t last_row);
  void (*backward[vrwkv_ops::kMaxMixes])(const TokenShiftBackwardParams<scalar_t>&, int64_t piece);
};

}  // namespace vrwkv_cpu
