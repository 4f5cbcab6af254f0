// The element-wise functions on the CPU.
#include <ATen/Parallel.h>

#include "../common/cpu_dispatch.h"
#include "../operators.h"
#include "cpu_kernels.h"
#include "host.h"

namespace vrwkv_cpu {
namespace {

constexpr int64_t kGrain = 32768;  // a thread takes at least this many elements

struct CpuBackend {
  template <vrwkv_ops::PointwiseFunction function, typename scalar_t>
  static void run(const PointwiseParams<scalar_t>& p, int64_t count) {
    const auto kernel = cpu_kernels<PointwiseKernels<scalar_t>>().functions[function];
    at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }
};

void no_guard(const at::Tensor&) {}

}  // namespace

VRWKV_DEFINE_POINTWISE(CpuBackend, no_guard)

}  // namespace vrwkv_cpu
