// Q-Shift on CUDA: a thread copies one element from the neighbour that its channel's group takes.
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>

#include "../ops.h"

namespace vrwkv_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // further elements by strides

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    q_shift_kernel(const scalar_t* __restrict__ x, scalar_t* __restrict__ out, int64_t count, int64_t height, int64_t width,
                   int64_t channels, int64_t batch_stride, int64_t token_stride, int64_t channel_stride, int64_t step,
                   vrwkv_ops::ChannelGroups groups) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const int64_t c = i % channels, token = i / channels;
    const int64_t w = token % width, h = token / width % height, b = token / width / height;
    int64_t row = h, column = w;
    if (c < groups.end[0]) {
      column -= step;
    } else if (c < groups.end[1]) {
      column += step;
    } else if (c < groups.end[2]) {
      row -= step;
    } else if (c < groups.end[3]) {
      row += step;
    }
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    out[i] = inside ? x[b * batch_stride + (row * width + column) * token_stride + c * channel_stride] : scalar_t(0);
  }
}

}  // namespace

at::Tensor q_shift(const at::Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma,
                   bool reverse) {
  vrwkv_ops::check_grid(x, height, width, shift_pixel);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  const int64_t blocks = std::min((x.numel() + kThreads - 1) / kThreads, kMaxBlocks);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "q_shift", [&] {
    q_shift_kernel<scalar_t><<<static_cast<unsigned>(blocks), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        x.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>(), x.numel(), height, width, x.size(2), x.stride(0),
        x.stride(1), x.stride(2), reverse ? -shift_pixel : shift_pixel, vrwkv_ops::ChannelGroups(x.size(2), channel_gamma));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace vrwkv_cuda
