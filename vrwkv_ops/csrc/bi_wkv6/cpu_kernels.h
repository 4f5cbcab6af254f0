// The bi_wkv6 kernels of one CPU instruction set, as cpu.cpp calls them.
#pragma once

#include "../common/cpu_isa.h"
#include "params.h"

namespace vrwkv_cpu {

using vrwkv_ops::Wkv6BackwardParams;
using vrwkv_ops::Wkv6ForwardParams;

constexpr int64_t kWkv6Columns = 16;  // value columns of a tile

template <typename scalar_t>
struct Wkv6Kernels {
  // The value columns from first to last (multiples of kWkv6Columns) of one head.
  void (*forward)(const Wkv6ForwardParams<scalar_t>&, int64_t image, int64_t head, int64_t first, int64_t last);
  void (*backward)(const Wkv6BackwardParams<scalar_t>&, int64_t image, int64_t head);
};

}  // namespace vrwkv_cpu
