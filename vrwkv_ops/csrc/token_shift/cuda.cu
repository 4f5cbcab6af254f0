// Token shifts on CUDA. A thread takes 16 bytes of neighbouring channels if groups, strides and addresses allow it, else one
// channel.
#include <limits>

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

// A block of threads takes neighbouring tokens of one row of one grid; no thread divides 64-bit numbers. With `packs` vectors of
// channels, a token takes as many threads.
__host__ __device__ constexpr int64_t tokens_of_block(int64_t packs) {
  return packs < kBlockThreads ? kBlockThreads / static_cast<int>(packs) : 1;
}

dim3 grid_of(const ShiftGeometry& geometry, int64_t batch, int64_t packs) {
  const int64_t rows = batch * geometry.height, columns = ceil_div(geometry.width, tokens_of_block(packs));
  TORCH_CHECK(rows <= std::numeric_limits<int32_t>::max(), "token shift: expected B * height below 2^31 on CUDA, got ", rows);
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(std::min<int64_t>(columns, 65535)));
}

// Calls body(image, token, token that is taken or -1, first channel) for the tokens and vectors of channels of this thread.
template <int kLanes, typename Body>
__device__ void for_each_place(const ShiftGeometry& geometry, int64_t channels, bool reverse, const Body& body) {
  const auto packs = static_cast<unsigned>(channels / kLanes);
  const unsigned place = threadIdx.x / packs;
  const int64_t step = tokens_of_block(packs);
  if (place >= step) return;
  const unsigned image = blockIdx.x / static_cast<unsigned>(geometry.height);
  const int64_t row = blockIdx.x % static_cast<unsigned>(geometry.height);
  for (unsigned pack = threadIdx.x % packs; pack < packs; pack += kBlockThreads) {
    const int64_t c = static_cast<int64_t>(pack) * kLanes;
    const int group = geometry.group(c);
    for (int64_t column = blockIdx.y * step + place; column < geometry.width; column += gridDim.y * step)
      body(image, row * geometry.width + column, geometry.neighbour(row, column, group, reverse), c);
  }
}

template <int kLanes, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads)
    q_shift_kernel(const __grid_constant__ View<scalar_t> x, scalar_t* out, int64_t channels,
                   const __grid_constant__ ShiftGeometry geometry, bool reverse) {
  for_each_place<kLanes>(geometry, channels, reverse, [&](int64_t image, int64_t t, int64_t from, int64_t c) {
    vrwkv::Pack<scalar_t, kLanes> pack{};
    if (from >= 0) pack = *reinterpret_cast<const vrwkv::Pack<scalar_t, kLanes>*>(x.row(image, from, c));
    *reinterpret_cast<vrwkv::Pack<scalar_t, kLanes>*>(out + (image * geometry.tokens() + t) * channels + c) = pack;
  });
}

template <int kMixes, int kLanes, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads)
    shift_forward_kernel(const __grid_constant__ TokenShiftForwardParams<scalar_t> p) {
  for_each_place<kLanes>(p.geometry, p.channels, false, [&](int64_t image, int64_t t, int64_t from, int64_t c) {
    vrwkv::shift_forward<kMixes, kLanes>(p, image, t, from, c);
  });
}

// A block of threads covers kColumns vectors of channels and kRows tokens, and loops over the rows of a piece. Each thread sums
// the gradients of the mixes over its tokens; the first row of threads then sums over all threads in a fixed order.
constexpr int kColumns = 16, kRows = kBlockThreads / kColumns;

template <int kMixes, int kLanes, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads)
    shift_backward_kernel(const __grid_constant__ TokenShiftBackwardParams<scalar_t> p) {
  using T = acc_type<scalar_t>;
  __shared__ T shared[kRows][kMixes][kLanes][kColumns];
  const int column = threadIdx.x % kColumns, row_of_threads = threadIdx.x / kColumns;
  const int64_t piece = blockIdx.x, c = (static_cast<int64_t>(blockIdx.y) * kColumns + column) * kLanes;
  const int64_t tokens = p.geometry.tokens(), rows = p.batch * tokens;
  const int64_t first = piece * p.piece_rows, last = first + p.piece_rows < rows ? first + p.piece_rows : rows;
  vrwkv::Vector<T, kLanes> gmixes[kMixes];
  if (c < p.channels) {
    const int group = p.geometry.group(c);
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
  if (row_of_threads > 0 || c >= p.channels) return;
  for (int n = 0; n < kMixes; ++n) {
    for (int j = 0; j < kLanes; ++j) {
      T sum = T(0);
      for (int i = 0; i < kRows; ++i) sum += shared[i][n][j][column];
      p.gmixes[(piece * kMixes + n) * p.channels + c + j] = sum;
    }
  }
}

template <typename scalar_t>
bool is_packed(const View<scalar_t>& x) {
  constexpr int kLanes = kPackLanes<scalar_t>;
  return is_aligned(x.data) && x.channel_stride == 1 && x.token_stride % kLanes == 0 && x.batch_stride % kLanes == 0;
}

// Whether every vector of 16 bytes lies in one group of channels and is aligned.
template <typename scalar_t>
bool is_packed(const View<scalar_t>& x, const ShiftGeometry& geometry) {
  constexpr int kLanes = kPackLanes<scalar_t>;
  bool whole = geometry.head % kLanes == 0 && is_packed(x);
  for (const int64_t end : geometry.end) whole = whole && end % kLanes == 0;
  return whole;
}

template <typename P>
bool is_packed(const P& p) {
  return is_packed(p.x, p.geometry) && is_aligned(p.mixes, kPackLanes<typename P::scalar_type> * sizeof(*p.mixes));
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
    const dim3 grid = grid_of(p.geometry, p.batch, p.channels / kLanes);
    shift_forward_kernel<kMixes, kLanes><<<grid, kBlockThreads, 0, at::cuda::getCurrentCUDAStream()>>>(p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <int kMixes, int kLanes, typename scalar_t>
  static void launch(const TokenShiftBackwardParams<scalar_t>& p, int64_t pieces) {
    const int64_t columns = ceil_div(p.channels, kColumns * kLanes);
    TORCH_CHECK(columns <= 65535, "token_shift_backward: expected at most ", 65535 * kColumns * kLanes,
                " channels on CUDA, got ", p.channels);
    const dim3 grid(static_cast<unsigned>(pieces), static_cast<unsigned>(columns));
    shift_backward_kernel<kMixes, kLanes><<<grid, kBlockThreads, 0, at::cuda::getCurrentCUDAStream()>>>(p);
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
    const auto source = vrwkv_ops::view<scalar_t>(x);
    scalar_t* const to = out.mutable_data_ptr<scalar_t>();
    const auto launch = [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      const dim3 grid = grid_of(geometry, x.size(0), x.size(2) / kLanes);
      const auto stream = at::cuda::getCurrentCUDAStream();
      q_shift_kernel<kLanes><<<grid, kBlockThreads, 0, stream>>>(source, to, x.size(2), geometry, reverse);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (is_packed(source, geometry) && is_aligned(to)) {
      launch(std::integral_constant<int, kPackLanes<scalar_t>>());
    } else {
      launch(std::integral_constant<int, 1>());
    }
  });
  return out;
}

std::vector<at::Tensor> token_shift_forward(const at::Tensor& x, const at::Tensor& mixes, int64_t height, int64_t width,
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
