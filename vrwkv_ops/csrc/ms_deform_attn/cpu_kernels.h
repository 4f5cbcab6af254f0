// The kernels of multi-scale deformable attention of one CPU instruction set, as cpu.cpp calls them.
#pragma once

#include "../common/cpu_isa.h"
#include "params.h"

namespace vrwkv_cpu {

// For points in the dtype of the values, and in that of accumulation.
template <typename scalar_t>
struct DeformKernels {
  template <typename point_t>
  using Params = vrwkv_ops::DeformParams<scalar_t, point_t>;
  using acc_t = vrwkv_ops::acc_type<scalar_t>;

  // Rows are the queries of all images.
  template <typename point_t>
  using Forward = void (*)(const Params<point_t>&, int64_t first_row, int64_t last_row);
  // All queries of one image and head. `sums` has (S, D) zeros for half types, which are added in float32; `row` has room for
  // D numbers.
  template <typename point_t>
  using Backward = void (*)(const Params<point_t>&, int64_t image, int64_t head, acc_t* sums, acc_t* row);

  Forward<scalar_t> forward;
  Forward<acc_t> forward_wide;
  Backward<scalar_t> backward;
  Backward<acc_t> backward_wide;
};

}  // namespace vrwkv_cpu
