// Bi-WKV on CUDA: a thread takes one channel of one chunk of tokens, with the algorithm of ../tile.h.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <limits>

#include "../driver.h"

// What a thread keeps per token of its chunk lies in local memory, which the L1 cache holds.
#define VRWKV_TILE_WIDTH 1
#define VRWKV_TILE_TOKENS 32
#include "../tile.h"

namespace vrwkv_cuda {
namespace {

using vrwkv_ops::Backward;
using vrwkv_ops::ceil_div;
using vrwkv_ops::Forward;
using vrwkv_ops::Problem;

constexpr int kThreads = 64;
constexpr int kJoined = 32;  // channels of a block that joins chunks
constexpr int64_t kMaxGridX = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxGridY = 65535;

template <typename scalar_t, bool causal>
struct ForwardSteps {
  static __device__ void states(const Forward<scalar_t>& p, int64_t b, int64_t chunk, int64_t c) {
    vrwkv::forward_states<scalar_t, causal>(p, b, chunk, c);
  }
  template <typename P>
  using Joiner = vrwkv::Joiner<vrwkv::WkvState, P>;
  using Segment = vrwkv::Segment<vrwkv::WkvState>;
  static constexpr int kFirstDirection = 0, kDirections = causal ? 1 : 2;
  static __device__ void outputs(const Forward<scalar_t>& p, int64_t b, int64_t chunk, int64_t c) {
    vrwkv::forward_outputs<scalar_t, causal>(p, b, chunk, c);
  }
};

template <typename scalar_t, bool causal>
struct BackwardSteps {
  static __device__ void states(const Backward<scalar_t>& p, int64_t b, int64_t chunk, int64_t c) {
    vrwkv::backward_states<scalar_t, causal>(p, b, chunk, c);
  }
  template <typename P>
  using Joiner = vrwkv::Joiner<vrwkv::GradState, P>;
  using Segment = vrwkv::Segment<vrwkv::GradState>;
  static constexpr int kFirstDirection = causal ? 1 : 0, kDirections = causal ? 1 : 2;
  static __device__ void outputs(const Backward<scalar_t>& p, int64_t b, int64_t chunk, int64_t c) {
    vrwkv::backward_outputs<scalar_t, causal>(p, b, chunk, c);
  }
};

// blockIdx.y covers the channels, blockIdx.x whatever else there is, in strides where that exceeds a grid.
__device__ int64_t channel() { return static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; }

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) decay_kernel(const Problem<scalar_t> p) {
  if (channel() < p.channels) vrwkv::fill_decay(p, channel());
}

template <typename Steps, typename P>
__global__ void __launch_bounds__(kThreads) states_kernel(const P p) {
  if (channel() >= p.channels) return;
  for (int64_t i = blockIdx.x; i < p.batch * p.chunks; i += gridDim.x) Steps::states(p, i / p.chunks, i % p.chunks, channel());
}

// A block of threads joins the chunks of kJoined channels of one image in one direction, a segment to a thread.
template <typename Steps, typename P>
__global__ void __launch_bounds__(kJoined* vrwkv::kSegments) join_kernel(const P p) {
  __shared__ alignas(
      typename Steps::Segment) unsigned char memory[sizeof(typename Steps::Segment) * kJoined * vrwkv::kSegments];
  auto* const segments = reinterpret_cast<typename Steps::Segment*>(memory);
  const int column = threadIdx.x % kJoined, segment = threadIdx.x / kJoined;
  const int64_t c = static_cast<int64_t>(blockIdx.y) * kJoined + column;
  for (int64_t i = blockIdx.x; i < p.batch * Steps::kDirections; i += gridDim.x) {
    const int direction = Steps::kFirstDirection + static_cast<int>(i % Steps::kDirections);
    if (c < p.channels) {
      const typename Steps::template Joiner<P> joiner(p, i / Steps::kDirections, c, direction, vrwkv::kSegments);
      joiner.sum_up(segment, segments + segment * kJoined + column);
    }
    __syncthreads();
    if (c < p.channels) {
      const typename Steps::template Joiner<P> joiner(p, i / Steps::kDirections, c, direction, vrwkv::kSegments);
      joiner.enter(segment, segments + column, kJoined);
    }
    __syncthreads();  // before the next image overwrites
  }
}

template <typename Steps, typename P>
__global__ void __launch_bounds__(kThreads) outputs_kernel(const P p) {
  if (channel() >= p.channels) return;
  for (int64_t i = blockIdx.x; i < p.batch * p.chunks; i += gridDim.x) Steps::outputs(p, i / p.chunks, i % p.chunks, channel());
}

// Scans chunks on their own, joins their states, then writes the outputs of every chunk, all on the current stream.
template <typename Steps, typename P>
void run_steps(const P& p) {
  const int64_t blocks = ceil_div(p.channels, kThreads);
  TORCH_CHECK(ceil_div(p.channels, kJoined) <= kMaxGridY, "bi_wkv: expected at most ", kMaxGridY * kJoined,
              " channels on CUDA, got ", p.channels);
  const auto grid = [&](int64_t work) {
    return dim3(static_cast<unsigned>(std::min(work, kMaxGridX)), static_cast<unsigned>(blocks));
  };
  const auto stream = at::cuda::getCurrentCUDAStream();
  decay_kernel<typename P::scalar_type><<<grid(1), kThreads, 0, stream>>>(p);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (p.chunks > 1) {
    states_kernel<Steps><<<grid(p.batch * p.chunks), kThreads, 0, stream>>>(p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const auto joins = static_cast<unsigned>(std::min(p.batch * Steps::kDirections, kMaxGridX));
    const dim3 join_grid(joins, static_cast<unsigned>(ceil_div(p.channels, kJoined)));
    join_kernel<Steps><<<join_grid, kJoined * vrwkv::kSegments, 0, stream>>>(p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  outputs_kernel<Steps><<<grid(p.batch * p.chunks), kThreads, 0, stream>>>(p);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Cuda {
  static int64_t chunk_length(int64_t tokens) { return std::min<int64_t>(tokens, VRWKV_TILE_TOKENS); }

  template <typename scalar_t>
  static void run(const Forward<scalar_t>& p, bool causal) {
    causal ? run_steps<ForwardSteps<scalar_t, true>>(p) : run_steps<ForwardSteps<scalar_t, false>>(p);
  }
  template <typename scalar_t>
  static void run(const Backward<scalar_t>& p, bool causal) {
    causal ? run_steps<BackwardSteps<scalar_t, true>>(p) : run_steps<BackwardSteps<scalar_t, false>>(p);
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> bi_wkv_forward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                                                              const at::Tensor& v, bool causal, bool save) {
  const c10::cuda::CUDAGuard guard(k.device());
  return vrwkv_ops::forward<Cuda>(w, u, k, v, causal, save);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv_backward(const at::Tensor& gy, const at::Tensor& w,
                                                                           const at::Tensor& u, const at::Tensor& k,
                                                                           const at::Tensor& v, const at::Tensor& y,
                                                                           const at::Tensor& y_residual, const at::Tensor& z,
                                                                           bool causal) {
  const c10::cuda::CUDAGuard guard(k.device());
  return vrwkv_ops::backward<Cuda>(gy, w, u, k, v, y, y_residual, z, causal);
}

}  // namespace vrwkv_cuda
