// Token shift kernels for one CPU instruction set: the build compiles this file once for each (common/cpu_isa.h).
#include "cpu_kernels.h"

#include "../common/cpu_isa_begin.h"
#include "token_shift.h"

namespace {
namespace vrwkv {

// A quarter of most models' channels is a multiple of it.
constexpr int kShiftLanes = 16;

// Kernels prefetch this many tokens ahead: a store that waits for its memory delays all others.
constexpr int64_t kPrefetchTokens = 2;

// Calls body(b, t, from, to, c, lanes) for all channels of the tokens in some rows (tokens of all images): for blocks of
// neighbouring channels, and for single channels where a group ends or the tensors are not contiguous.
template <typename P, typename Body>
VRWKV_FN void for_each_block(const P& p, int64_t first_row, int64_t last_row, bool contiguous, const Body& body) {
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t b = row / p.geometry.tokens(), t = row % p.geometry.tokens();
    const auto from = p.geometry.neighbours(t, false), to = p.geometry.neighbours(t, true);
    for_each_group(p.geometry, p.channels, [&](int group, int64_t c, int64_t end) VRWKV_INLINE_LAMBDA {
      for (; contiguous && c + kShiftLanes <= end; c += kShiftLanes)
        body(b, t, from.at[group], to.at[group], c, std::integral_constant<int, kShiftLanes>());
      for (; c < end; ++c) body(b, t, from.at[group], to.at[group], c, std::integral_constant<int, 1>());
    });
  }
}

template <typename scalar_t, int kMixes>
void shift_forward_rows(const TokenShiftForwardParams<scalar_t>& p, int64_t first_row, int64_t last_row) {
  const bool contiguous = p.x.channel_stride == 1;
  for_each_block(p, first_row, last_row, contiguous,
                 [&](int64_t b, int64_t t, int64_t from, int64_t, int64_t c, auto lanes) VRWKV_INLINE_LAMBDA {
                   constexpr int kLanes = decltype(lanes)::value;
                   const int64_t later = t + kPrefetchTokens;
                   if (kLanes > 1 && later < p.geometry.tokens()) {
                     prefetch<kLanes, false>(p.x.row(b, later, c));
                     for (int n = 0; n < kMixes; ++n)
                       prefetch<kLanes, true>(p.out[n] + (b * p.geometry.tokens() + later) * p.channels + c);
                   }
                   shift_forward<kMixes, kLanes>(p, b, t, from, c);
                 });
}

template <typename scalar_t, int kMixes>
void shift_backward_piece(const TokenShiftBackwardParams<scalar_t>& p, int64_t piece) {
  using T = acc_type<scalar_t>;
  const int64_t first = piece * p.piece_rows, rows = p.batch * p.geometry.tokens();
  const int64_t last = first + p.piece_rows < rows ? first + p.piece_rows : rows;
  T* sums = p.gmixes + piece * kMixes * p.channels;
  for (int64_t i = 0; i < kMixes * p.channels; ++i) sums[i] = T(0);
  bool contiguous = p.x.channel_stride == 1;
  for (int n = 0; n < kMixes; ++n) contiguous = contiguous && p.grads[n].channel_stride == 1;
  for_each_block(p, first, last, contiguous,
                 [&](int64_t b, int64_t t, int64_t from, int64_t to, int64_t c, auto lanes) VRWKV_INLINE_LAMBDA {
                   constexpr int kLanes = decltype(lanes)::value;
                   const int64_t later = t + kPrefetchTokens;
                   if (kLanes > 1 && later < p.geometry.tokens()) {
                     prefetch<kLanes, false>(p.x.row(b, later, c));
                     for (int n = 0; n < kMixes; ++n) prefetch<kLanes, false>(p.grads[n].row(b, later, c));
                     prefetch<kLanes, true>(p.gx + (b * p.geometry.tokens() + later) * p.channels + c);
                   }
                   Vector<T, kLanes> gmixes[kMixes];
                   for (int n = 0; n < kMixes; ++n) load(gmixes[n], sums + n * p.channels + c, 1, kLanes);
                   shift_backward<kMixes, kLanes>(p, b, t, from, to, c, gmixes);
                   for (int n = 0; n < kMixes; ++n) store(sums + n * p.channels + c, gmixes[n], kLanes);
                 });
}

template <typename scalar_t>
constexpr vrwkv_cpu::TokenShiftKernels<scalar_t> make_table() {
  return {{shift_forward_rows<scalar_t, 1>, shift_forward_rows<scalar_t, 2>, shift_forward_rows<scalar_t, 3>},
          {shift_backward_piece<scalar_t, 1>, shift_backward_piece<scalar_t, 2>, shift_backward_piece<scalar_t, 3>}};
}

}  // namespace vrwkv
}  // namespace

VRWKV_DEFINE_CPU_KERNELS(vrwkv_cpu::TokenShiftKernels)

#include "../common/cpu_isa_end.h"
