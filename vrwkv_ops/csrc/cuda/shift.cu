// Token shifts on CUDA. A thread takes 16 bytes of neighbouring channels where groups, strides and addresses allow it, else one.
#include "../shift.h"
#include "../shift_driver.h"
#include "launch.h"

namespace vrwkv_cuda {
namespace {

using vrwkv_ops::acc_type;
using vrwkv_ops::ceil_div;
using vrwkv_ops::make_shift;
using vrwkv_ops::Shift;
using vrwkv_ops::ShiftBackward;
using vrwkv_ops::ShiftForward;
using vrwkv_ops::View;

template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads)
    q_shift_kernel(const View<scalar_t> x, scalar_t* __restrict__ out, int64_t count, int64_t channels, const Shift shift,
                   bool reverse) {
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    const int64_t c = i % channels, row = i / channels;
    const int64_t b = row / shift.tokens(), source = shift.neighbour(row % shift.tokens(), shift.group(c), reverse);
    out[i] = source < 0 ? scalar_t(0) : *x.row(b, source, c);
  }
}

template <int kMixes, int kLanes, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads) shift_forward_kernel(const ShiftForward<scalar_t> p) {
  const int64_t blocks = p.channels / kLanes, count = p.batch * p.shift.tokens() * blocks;
  for (int64_t i = first_item(); i < count; i += item_stride()) {
    const int64_t c = i % blocks * kLanes, row = i / blocks;
    const int64_t b = row / p.shift.tokens(), t = row % p.shift.tokens();
    const int64_t from = p.shift.neighbour(t, p.shift.group(c), false);
    vrwkv::shift_forward<kMixes, kLanes, (kLanes > 1)>(p, b, t, from, c, kLanes);
  }
}

// A block of threads, kColumns blocks of channels wide and kRows tokens deep, takes the pieces of rows that it reaches. Threads
// add up the gradients of the mixes over their tokens, and the first row of threads those of all, in order.
constexpr int kColumns = 16, kRows = kBlockThreads / kColumns;

template <int kMixes, int kLanes, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads) shift_backward_kernel(const ShiftBackward<scalar_t> p, int64_t pieces) {
  using T = acc_type<scalar_t>;
  __shared__ T shared[kRows][kMixes][kLanes][kColumns];
  const int column = threadIdx.x % kColumns, row_of_threads = threadIdx.x / kColumns;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * kColumns + column) * kLanes;
  const int64_t tokens = p.shift.tokens(), rows = p.batch * tokens;
  const int group = p.shift.group(c);
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    vrwkv::LanesOf<T, kLanes> gmixes[kMixes];
    const int64_t first = piece * p.piece_rows, last = first + p.piece_rows < rows ? first + p.piece_rows : rows;
    if (c < p.channels) {
      for (int64_t row = first + row_of_threads; row < last; row += kRows) {
        const int64_t t = row % tokens;
        vrwkv::shift_backward<kMixes, kLanes, (kLanes > 1)>(p, row / tokens, t, p.shift.neighbour(t, group, false),
                                                            p.shift.neighbour(t, group, true), c, kLanes, gmixes);
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
bool packs(const View<scalar_t>& x) {
  constexpr int kLanes = kPackLanes<scalar_t>;
  return is_aligned(x.data) && x.channel_stride == 1 && x.token_stride % kLanes == 0 && x.batch_stride % kLanes == 0;
}

// Whether blocks of 16 bytes lie in one group each, and are aligned in x.
template <typename P>
bool packs(const P& p) {
  constexpr int kLanes = kPackLanes<typename P::scalar_type>;
  bool whole = p.channels % kLanes == 0 && packs(p.x) && is_aligned(p.mixes, kLanes * sizeof(*p.mixes));
  for (const int64_t end : p.shift.end) whole = whole && end % kLanes == 0;
  return whole;
}

struct Cuda {
  template <int kMixes, typename scalar_t>
  static void run(const ShiftForward<scalar_t>& p) {
    bool wide = packs(p);
    for (int n = 0; n < kMixes; ++n) wide = wide && is_aligned(p.out[n]);
    wide ? launch<kMixes, kPackLanes<scalar_t>>(p) : launch<kMixes, 1>(p);
  }

  template <int kMixes, typename scalar_t>
  static void run(const ShiftBackward<scalar_t>& p, int64_t pieces) {
    bool wide = packs(p) && is_aligned(p.gx);
    for (int n = 0; n < kMixes; ++n) wide = wide && packs(p.grads[n]);
    wide ? launch<kMixes, kPackLanes<scalar_t>>(p, pieces) : launch<kMixes, 1>(p, pieces);
  }

 private:
  template <int kMixes, int kLanes, typename scalar_t>
  static void launch(const ShiftForward<scalar_t>& p) {
    const int64_t threads = p.batch * p.shift.tokens() * (p.channels / kLanes);
    shift_forward_kernel<kMixes, kLanes><<<blocks_for(threads), kBlockThreads, 0, at::cuda::getCurrentCUDAStream()>>>(p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <int kMixes, int kLanes, typename scalar_t>
  static void launch(const ShiftBackward<scalar_t>& p, int64_t pieces) {
    const int64_t columns = ceil_div(p.channels, kColumns * kLanes);
    TORCH_CHECK(columns <= 65535, "token_shift_backward: expected at most ", 65535 * kColumns, " channels on CUDA, got ",
                p.channels);
    const dim3 grid(static_cast<unsigned>(pieces), static_cast<unsigned>(columns));
    shift_backward_kernel<kMixes, kLanes><<<grid, kBlockThreads, 0, at::cuda::getCurrentCUDAStream()>>>(p, pieces);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace

at::Tensor q_shift(const at::Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma,
                   bool reverse) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Shift shift = make_shift(x, height, width, shift_pixel, channel_gamma, "q_shift");
  const at::Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "q_shift", [&] {
    q_shift_kernel<scalar_t><<<blocks_for(x.numel()), kBlockThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        vrwkv_ops::view<scalar_t>(x), out.mutable_data_ptr<scalar_t>(), x.numel(), x.size(2), shift, reverse);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

std::vector<at::Tensor> token_shift(const at::Tensor& x, const at::Tensor& mixes, int64_t height, int64_t width,
                                    int64_t shift_pixel, double channel_gamma, c10::string_view mode) {
  const c10::cuda::CUDAGuard guard(x.device());
  return vrwkv_ops::token_shift<Cuda>(x, mixes, make_shift(x, height, width, shift_pixel, channel_gamma, mode));
}

std::tuple<at::Tensor, at::Tensor> token_shift_backward(at::TensorList grads, const at::Tensor& x, const at::Tensor& mixes,
                                                        int64_t height, int64_t width, int64_t shift_pixel,
                                                        double channel_gamma, c10::string_view mode) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Shift shift = make_shift(x, height, width, shift_pixel, channel_gamma, mode);
  return vrwkv_ops::token_shift_backward<Cuda>(grads, x, mixes, shift);
}

}  // namespace vrwkv_cuda
