// The element-wise functions on CUDA. A thread takes 16 bytes of every tensor, or one element if the tensors are not aligned.
#include "../common/cuda_launch.h"
#include "../operators.h"
#include "functions.h"
#include "host.h"

namespace vrwkv_cuda {
namespace {

using vrwkv_ops::PointwiseFunction;
using vrwkv_ops::PointwiseParams;

template <PointwiseFunction function>
struct Functor;
template <>
struct Functor<vrwkv_ops::kSquaredRelu> : vrwkv::SquaredRelu {};
template <>
struct Functor<vrwkv_ops::kSquaredReluBackward> : vrwkv::SquaredReluBackward {};
template <>
struct Functor<vrwkv_ops::kSigmoidGate> : vrwkv::SigmoidGate {};
template <>
struct Functor<vrwkv_ops::kSigmoidGateBackward> : vrwkv::SigmoidGateBackward {};

// Elements past the last whole pack are computed one by one.
template <typename Function, int kLanes, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads)
    pointwise_kernel(const PointwiseParams<scalar_t> p, int64_t packs, int64_t count) {
  for (int64_t i = first_item(); i < packs; i += item_stride()) vrwkv::pointwise<Function, kLanes>(p, i * kLanes, kLanes);
  for (int64_t i = packs * kLanes + first_item(); i < count; i += item_stride()) vrwkv::pointwise<Function, 1>(p, i, 1);
}

struct CudaBackend {
  template <PointwiseFunction function, typename scalar_t>
  static void run(const PointwiseParams<scalar_t>& p, int64_t count) {
    using Function = Functor<function>;
    bool aligned = true;
    for (int n = 0; n < Function::kInputs; ++n) aligned = aligned && is_aligned(p.in[n]);
    for (int n = 0; n < Function::kOutputs; ++n) aligned = aligned && is_aligned(p.out[n]);
    constexpr int kLanes = kPackLanes<scalar_t>;
    const int64_t packs = aligned ? count / kLanes : 0;
    const auto stream = at::cuda::getCurrentCUDAStream();
    pointwise_kernel<Function, kLanes><<<blocks_for(aligned ? packs + 1 : count), kBlockThreads, 0, stream>>>(p, packs, count);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

using Guard = c10::cuda::CUDAGuard;

}  // namespace

#define VRWKV_CUDA_GUARD(x) const Guard device_guard(x.device())
VRWKV_DEFINE_POINTWISE(CudaBackend, VRWKV_CUDA_GUARD)

}  // namespace vrwkv_cuda
