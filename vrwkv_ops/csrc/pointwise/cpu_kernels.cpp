// Element-wise kernels for one CPU instruction set: the build compiles this file once for each (common/cpu_isa.h).
#include "cpu_kernels.h"

#include "../common/cpu_isa_begin.h"
#include "functions.h"

namespace {
namespace vrwkv {

constexpr int kPointwiseLanes = 16;

template <typename scalar_t, typename Function>
void pointwise_range(const PointwiseParams<scalar_t>& p, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kPointwiseLanes <= end; i += kPointwiseLanes) pointwise<Function, kPointwiseLanes>(p, i, kPointwiseLanes);
  if (i < end) pointwise<Function, kPointwiseLanes>(p, i, static_cast<int>(end - i));
}

template <typename scalar_t>
constexpr vrwkv_cpu::PointwiseKernels<scalar_t> make_table() {
  return {{pointwise_range<scalar_t, SquaredRelu>, pointwise_range<scalar_t, SquaredReluBackward>,
           pointwise_range<scalar_t, SigmoidGate>, pointwise_range<scalar_t, SigmoidGateBackward>}};
}

}  // namespace vrwkv
}  // namespace

VRWKV_DEFINE_CPU_KERNELS(vrwkv_cpu::PointwiseKernels)

#include "../common/cpu_isa_end.h"
