// Token shifts on the CPU.
#include <ATen/Parallel.h>

#include "../common/cpu_dispatch.h"
#include "../operators.h"
#include "cpu_kernels.h"
#include "host.h"
#include "token_shift.h"

namespace vrwkv_cpu {
namespace {

using vrwkv_ops::make_geometry;

constexpr int64_t kGrain = 16384;  // a thread takes at least this many elements

struct CpuBackend {
  template <int kMixes, typename scalar_t>
  static void run(const TokenShiftForwardParams<scalar_t>& p) {
    const auto kernel = cpu_kernels<TokenShiftKernels<scalar_t>>().forward[kMixes - 1];
    const int64_t rows = p.batch * p.geometry.tokens();
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / p.channels),
                     [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  template <int kMixes, typename scalar_t>
  static void run(const TokenShiftBackwardParams<scalar_t>& p, int64_t pieces) {
    const auto kernel = cpu_kernels<TokenShiftKernels<scalar_t>>().backward[kMixes - 1];
    at::parallel_for(0, pieces, std::max<int64_t>(1, kGrain / (p.channels * p.piece_rows)), [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) kernel(p, piece);
    });
  }
};

template <typename scalar_t>
void copy(scalar_t* to, const scalar_t* from, int64_t stride, int64_t count) {
  if (stride == 1) {
    std::copy_n(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
  }
}

}  // namespace

// Copies four groups of channels from neighbours, and the last channels from the token itself.
at::Tensor q_shift(const at::Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma, bool reverse,
                   int64_t heads) {
  const auto geometry = make_geometry(x, height, width, shift_pixel, channel_gamma, "q_shift", heads);
  at::Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  const int64_t channels = x.size(2), tokens = x.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "q_shift", [&] {
    const auto from = vrwkv_ops::view<scalar_t>(x);
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0) * tokens, std::max<int64_t>(1, kGrain / channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tokens, t = i % tokens;
        scalar_t* token = to + i * channels;
        const auto sources = geometry.neighbours(t, reverse);
        vrwkv::for_each_group(geometry, channels, [&](int group, int64_t first, int64_t last) {
          if (sources.at[group] < 0) {
            std::fill(token + first, token + last, scalar_t(0));
          } else {
            copy(token + first, from.row(b, sources.at[group], first), from.channel_stride, last - first);
          }
        });
      }
    });
  });
  return out;
}

std::vector<at::Tensor> token_shift_forward(const at::Tensor& x, const at::Tensor& mixes, int64_t height, int64_t width,
                                            int64_t shift_pixel, double channel_gamma, c10::string_view mode, int64_t heads) {
  return vrwkv_ops::token_shift<CpuBackend>(x, mixes, make_geometry(x, height, width, shift_pixel, channel_gamma, mode, heads));
}

std::tuple<at::Tensor, at::Tensor> token_shift_backward(at::TensorList grads, const at::Tensor& x, const at::Tensor& mixes,
                                                        int64_t height, int64_t width, int64_t shift_pixel,
                                                        double channel_gamma, c10::string_view mode, int64_t heads) {
  const auto geometry = make_geometry(x, height, width, shift_pixel, channel_gamma, mode, heads);
  return vrwkv_ops::token_shift_backward<CpuBackend>(grads, x, mixes, geometry);
}

}  // namespace vrwkv_cpu
