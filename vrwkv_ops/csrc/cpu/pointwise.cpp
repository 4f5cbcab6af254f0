// The element-wise functions on the CPU.
#include <ATen/Parallel.h>

#include "../pointwise_driver.h"
#include "kernels.h"

namespace vrwkv_cpu {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at least

struct Cpu {
  template <vrwkv_ops::PointwiseFunction function, typename scalar_t>
  static void run(const Pointwise<scalar_t>& p, int64_t count) {
    const auto kernel = kernels<scalar_t>().pointwise[function];
    at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }
};

void no_guard(const at::Tensor&) {}

}  // namespace

VRWKV_DEFINE_POINTWISE(Cpu, no_guard)

}  // namespace vrwkv_cpu
