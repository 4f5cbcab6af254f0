// Q-Shift on the CPU: every token is four copies from its neighbours and one of its own last channels.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../ops.h"

namespace vrwkv_cpu {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at least

template <typename scalar_t>
void copy(scalar_t* to, const scalar_t* from, int64_t stride, int64_t count) {
  if (stride == 1) {
    std::copy_n(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
  }
}

}  // namespace

at::Tensor q_shift(const at::Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma,
                   bool reverse) {
  vrwkv_ops::check_grid(x, height, width, shift_pixel);
  at::Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  const int64_t channels = x.size(2), tokens = x.size(1);
  const vrwkv_ops::ChannelGroups groups(channels, channel_gamma);
  const int64_t step = reverse ? -shift_pixel : shift_pixel;
  // Group 1 takes the token to the left, then right, above and below (design: columns first).
  const int64_t rows[4] = {0, 0, -step, step};
  const int64_t columns[4] = {-step, step, 0, 0};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "q_shift", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    const int64_t batch_stride = x.stride(0), token_stride = x.stride(1), stride = x.stride(2);
    at::parallel_for(0, x.size(0) * tokens, std::max<int64_t>(1, kGrain / channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tokens, h = i % tokens / width, w = i % width;
        const scalar_t* image = from + b * batch_stride;
        scalar_t* token = to + i * channels;
        int64_t first = 0;
        for (int n = 0; n < 4; ++n) {
          const int64_t row = h + rows[n], column = w + columns[n], count = groups.end[n] - first;
          if (row < 0 || row >= height || column < 0 || column >= width) {
            std::fill_n(token + first, count, scalar_t(0));
          } else {
            copy(token + first, image + (row * width + column) * token_stride + first * stride, stride, count);
          }
          first = groups.end[n];
        }
        copy(token + first, image + (h * width + w) * token_stride + first * stride, stride, channels - first);
      }
    });
  });
  return out;
}

}  // namespace vrwkv_cpu
