// Token shifts on CUDA. A thread takes 16 bytes of neighbouring channels if groups, strides and addresses allow it, else one
// channel.
#include "../common/cuda_launch.h"
#include "../operators.h"
#include "host.h"
#include "token_shift.h"

namespace vrwkv_cuda {
namespace {

using vrwkv_ops::acc_type;
using vrwkv_ops::ceil_div;
using vrwkv_ops::make_geometry;
using vrwkv_ops::ShiftGeometry;
using vrwkv_ops::TokenShiftBackwardParams;
using vrwkv_ops::TokenShiftForwardParams;
using vrwkv_ops::View;

template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads)
    q_shift_kernel(const View<scalar_t> x, scalar_t* __restrict__ out, int64_t count, int64_t channels,
                   const ShiftGeometry geometry, bool reverse) {
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    const int64_t c = i % channels, row = i / channels;
    const int64_t b = row / geometry.tokens(), source = geometry.neighbour(row % geometry.tokens(), geometry.group(c), reverse);
    out[i] = source < 0 ? scalar_t(0) : *x.row(b, source, c);
  }
}

template <int kMixes, int kLanes, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads) shift_forward_kernel(const TokenShiftForwardParams<scalar_t> p) {
  const int64_t blocks = p.channels / kLanes, count = p.batch * p.geometry.tokens() * blocks;
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    const int64_t c = i % blocks * kLanes, row = i / blocks;
    const int64_t b = row / p.geometry.tokens(), t = row % p.geometry.tokens();
    const int64_t from = p.geometry.neighbour(t, p.geometry.group(c), false);
    vrwkv::shift_forward<kMixes, kLanes>(p, b, t, from, c);
  }
}

// A block of threads covers kColumns vectors of channels and kRows tokens, and loops over pieces of rows. Each thread sums the
// gradients of the mixes over its tokens; the first row of threads then sums over all threads in a fixed order.
constexpr int kColumns = 16, kRows = kBlockThreads / kColumns;

template <int kMixes, int kLanes, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads)
    shift_backward_kernel(const TokenShiftBackwardParams<scalar_t> p, int64_t pieces) {
  using T = acc_type<scalar_t>;
  __shared__ T shared[kRows][kMixes][kLanes][kColumns];
  const int column = threadIdx.x % kColumns, row_of_threads = threadIdx.x / kColumns;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * kColumns + column) * kLanes;
  const int64_t tokens = p.geometry.tokens(), rows = p.batch * tokens;
  const int group = p.geometry.group(c);
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    vrwkv::Vector<T, kLanes> gmixes[kMixes];
    const int64_t first = piece * p.piece_rows, last = first + p.piece_rows < rows ? first + p.piece_rows : rows;
    if (c < p.channels) {
      for (int64_t row = first + row_of_threads; row < last; row += kRows) {
        const int64_t t = row % tokens;
        vrwkv::shift_backward<kMixes, kLanes>(p, row / tokens, t, p.geometry.neighbour(t, group, false),
                                              p.geometry.neighbour(t, group, true), c, gmixes);
      }
    }
    for (int n = 0; n < kMixes; ++n) {
      for (int j = 0; j < kLanes; ++j) shared[row_of_threads][n][j][column] = gmixes[n].x[j];
    }
    __syncthreads();
    if (row_of_threads == 0 && c < p.channels) {
      for (int n = 0; n < kMixes; ++n) {
        for (int j = 0; j < kLanes; ++j) {
          T sum = T(0);
          for (int i = 0; i < kRows; ++i) sum += shared[i][n][j][column];
          p.gmixes[(piece * kMixes + n) * p.channels + c + j] = sum;
        }
      }
    }
    __syncthreads();  // before the next piece overwrites
  }
}

template <typename scalar_t>
bool is_packed(const View<scalar_t>& x) {
  constexpr int kLanes = kPackLanes<scalar_t>;
  return is_aligned(x.data) && x.channel_stride == 1 && x.token_stride % kLanes == 0 && x.batch_stride % kLanes == 0;
}

// Whether every vector of 16 bytes lies in one group of channels and is aligned.
template <typename P>
bool is_packed(const P& p) {
  constexpr int kLanes = kPackLanes<typename P::scalar_type>;
  bool whole = p.geometry.head % kLanes == 0 && is_packed(p.x) && is_aligned(p.mixes, kLanes * sizeof(*p.mixes));
  for (const int64_t end : p.geometry.end) whole = whole && end % kLanes == 0;
  return whole;
}

struct CudaBackend {
  template <int kMixes, typename scalar_t>
  static void run(const TokenShiftForwardParams<scalar_t>& p) {
    bool wide = is_packed(p);
    for (int n = 0; n < kMixes; ++n) wide = wide && is_aligned(p.out[n]);
    wide ? launch<kMixes, kPackLanes<scalar_t>>(p) : launch<kMixes, 1>(p);
  }

  template <int kMixes, typename scalar_t>
  static void run(const TokenShiftBackwardParams<scalar_t>& p, int64_t pieces) {
    bool wide = is_packed(p) && is_aligned(p.gx);
    for (int n = 0; n < kMixes; ++n) wide = wide && is_packed(p.grads[n]);
    wide ? launch<kMixes, kPackLanes<scalar_t>>(p, pieces) : launch<kMixes, 1>(p, pieces);
  }

 private:
  template <int kMixes, int kLanes, typename scalar_t>
  static void launch(const TokenShiftForwardParams<scalar_t>& p) {
    const int64_t threads = p.batch * p.geometry.tokens() * (p.channels / kLanes);
    shift_forward_kernel<kMixes, kLanes><<<blocks_for(threads), kBlockThreads, 0, at::cuda::getCurrentCUDAStream()>>>(p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <int kMixes, int kLanes, typename scalar_t>
  static void launch(const TokenShiftBackwardParams<scalar_t>& p, int64_t pieces) {
    const int64_t columns = ceil_div(p.channels, kColumns * kLanes);
    TORCH_CHECK(columns <= 65535, "token_shift_backward: expected at most ", 65535 * kColumns, " channels on CUDA, got ",
                p.channels);
    const dim3 grid(static_cast<unsigned>(pieces), static_cast<unsigned>(columns));
    shift_backward_kernel<kMixes, kLanes><<<grid, kBlockThreads, 0, at::cuda::getCurrentCUDAStream()>>>(p, pieces);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace

at::Tensor q_shift(const at::Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma, bool reverse,
                   int64_t heads) {
  const c10::cuda::CUDAGuard guard(x.device());
  const ShiftGeometry geometry = make_geometry(x, height, width, shift_pixel, channel_gamma, "q_shift", heads);
  const at::Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "q_shift", [&] {
    q_shift_kernel<scalar_t><<<blocks_for(x.numel()), kBlockThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        vrwkv_ops::view<scalar_t>(x), out.mutable_data_ptr<scalar_t>(), x.numel(), x.size(2), geometry, reverse);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

std::vector<at::Tensor> token_shift(const at::Tensor& x, const at::Tensor& mixes, int64_t height, int64_t width,
                                    int64_t shift_pixel, double channel_gamma, c10::string_view mode, int64_t heads) {
  const c10::cuda::CUDAGuard guard(x.device());
  return vrwkv_ops::token_shift<CudaBackend>(x, mixes,
                                             make_geometry(x, height, width, shift_pixel, channel_gamma, mode, heads));
}

std::tuple<at::Tensor, at::Tensor> token_shift_backward(at::TensorList grads, const at::Tensor& x, const at::Tensor& mixes,
                                                        int64_t height, int64_t width, int64_t shift_pixel,
                                                        double channel_gamma, c10::string_view mode, int64_t heads) {
  const c10::cuda::CUDAGuard guard(x.device());
  const ShiftGeometry geometry = make_geometry(x, height, width, shift_pixel, channel_gamma, mode, heads);
  return vrwkv_ops::token_shift_backward<CudaBackend>(grads, x, mixes, geometry);
}

}  // namespace vrwkv_cuda
