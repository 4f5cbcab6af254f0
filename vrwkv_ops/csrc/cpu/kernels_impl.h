// All kernels for one instruction set: the including file chooses it.
#pragma once

#include "kernels.h"

#define VRWKV_TILE_WIDTH vrwkv_cpu::kLanes
#define VRWKV_TILE_TOKENS vrwkv_cpu::kMaxChunk
#include "../pointwise.h"
#include "../shift.h"
#include "../tile.h"

namespace {
namespace vrwkv {

// A quarter of most models' channels is a multiple of it.
constexpr int kShiftLanes = 16;

constexpr int kPointwiseLanes = 16;

// Calls body(b, t, from, to, c, count) for the blocks of channels of rows, tokens of all images. Of whole blocks the compiler
// knows the count.
template <typename P, typename Body>
VRWKV_FN void for_each_block(const P& p, int64_t first_row, int64_t last_row, const Body& body) {
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t b = row / p.shift.tokens(), t = row % p.shift.tokens();
    int64_t c = 0;
    for (int group = 0; group < 5; ++group) {
      const int64_t end = group < 4 ? p.shift.end[group] : p.channels;
      const int64_t from = p.shift.neighbour(t, group, false), to = p.shift.neighbour(t, group, true);
      for (; c + kShiftLanes <= end; c += kShiftLanes) body(b, t, from, to, c, kShiftLanes);
      if (c < end) body(b, t, from, to, c, static_cast<int>(end - c));
      c = end;
    }
  }
}

// Blocks ask for the memory of those as many tokens further: a store that has to wait for its memory holds up all others.
constexpr int64_t kShiftAhead = 2;

template <int kMixes, bool dense, typename scalar_t>
VRWKV_FN void shift_rows(const ShiftForward<scalar_t>& p, int64_t first_row, int64_t last_row) {
  for_each_block(p, first_row, last_row,
                 [&](int64_t b, int64_t t, int64_t from, int64_t, int64_t c, int count) VRWKV_INLINE_LAMBDA {
                   const int64_t later = t + kShiftAhead;
                   if (later < p.shift.tokens()) {
                     prefetch<kShiftLanes, false>(p.x.row(b, later, c));
                     for (int n = 0; n < kMixes; ++n)
                       prefetch<kShiftLanes, true>(p.out[n] + (b * p.shift.tokens() + later) * p.channels + c);
                   }
                   shift_forward<kMixes, kShiftLanes, dense>(p, b, t, from, c, count);
                 });
}

template <typename scalar_t, int kMixes>
void shift_forward_rows(const ShiftForward<scalar_t>& p, int64_t first_row, int64_t last_row) {
  p.x.channel_stride == 1 ? shift_rows<kMixes, true>(p, first_row, last_row)
                          : shift_rows<kMixes, false>(p, first_row, last_row);
}

template <int kMixes, bool dense, typename scalar_t>
VRWKV_FN void shift_rows(const ShiftBackward<scalar_t>& p, int64_t first_row, int64_t last_row, acc_type<scalar_t>* sums) {
  for_each_block(p, first_row, last_row,
                 [&](int64_t b, int64_t t, int64_t from, int64_t to, int64_t c, int count) VRWKV_INLINE_LAMBDA {
                   const int64_t later = t + kShiftAhead;
                   if (later < p.shift.tokens()) {
                     prefetch<kShiftLanes, false>(p.x.row(b, later, c));
                     for (int n = 0; n < kMixes; ++n) prefetch<kShiftLanes, false>(p.grads[n].row(b, later, c));
                     prefetch<kShiftLanes, true>(p.gx + (b * p.shift.tokens() + later) * p.channels + c);
                   }
                   LanesOf<acc_type<scalar_t>, kShiftLanes> gmixes[kMixes];
                   for (int n = 0; n < kMixes; ++n) load(gmixes[n], sums + n * p.channels + c, 1, count);
                   shift_backward<kMixes, kShiftLanes, dense>(p, b, t, from, to, c, count, gmixes);
                   for (int n = 0; n < kMixes; ++n) store(sums + n * p.channels + c, gmixes[n], count);
                 });
}

template <typename scalar_t, int kMixes>
void shift_backward_piece(const ShiftBackward<scalar_t>& p, int64_t piece) {
  using T = acc_type<scalar_t>;
  const int64_t first = piece * p.piece_rows, rows = p.batch * p.shift.tokens();
  const int64_t last = first + p.piece_rows < rows ? first + p.piece_rows : rows;
  T* sums = p.gmixes + piece * kMixes * p.channels;
  for (int64_t i = 0; i < kMixes * p.channels; ++i) sums[i] = T(0);
  bool dense = p.x.channel_stride == 1;
  for (int n = 0; n < kMixes; ++n) dense = dense && p.grads[n].channel_stride == 1;
  dense ? shift_rows<kMixes, true>(p, first, last, sums) : shift_rows<kMixes, false>(p, first, last, sums);
}

template <typename scalar_t, typename Function>
void pointwise_range(const Pointwise<scalar_t>& p, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kPointwiseLanes <= end; i += kPointwiseLanes) pointwise<Function, kPointwiseLanes>(p, i, kPointwiseLanes);
  if (i < end) pointwise<Function, kPointwiseLanes>(p, i, static_cast<int>(end - i));
}

template <typename scalar_t, bool causal>
struct OnTiles {
  using Tile = vrwkv::Tile<scalar_t>;

  static constexpr vrwkv_cpu::Steps<Forward<scalar_t>> forward() {
    using P = Forward<scalar_t>;
    return {[](const P& p, int64_t b, int64_t i, int64_t c) { forward_states<causal>(p, Tile(p, b, i, c)); },
            forward_combine<scalar_t, causal>,
            [](const P& p, int64_t b, int64_t i, int64_t c) { forward_outputs<causal>(p, Tile(p, b, i, c)); }};
  }
  static constexpr vrwkv_cpu::Steps<Backward<scalar_t>> backward() {
    using P = Backward<scalar_t>;
    return {[](const P& p, int64_t b, int64_t i, int64_t c) { backward_states<causal>(p, Tile(p, b, i, c)); },
            backward_combine<scalar_t, causal>,
            [](const P& p, int64_t b, int64_t i, int64_t c) { backward_outputs<causal>(p, Tile(p, b, i, c)); }};
  }
};

template <typename scalar_t>
constexpr vrwkv_cpu::Kernels<scalar_t> make_kernels() {
  return {fill_decay<scalar_t>,
          {OnTiles<scalar_t, false>::forward(), OnTiles<scalar_t, true>::forward()},
          {OnTiles<scalar_t, false>::backward(), OnTiles<scalar_t, true>::backward()},
          {shift_forward_rows<scalar_t, 1>, shift_forward_rows<scalar_t, 2>, shift_forward_rows<scalar_t, 3>},
          {shift_backward_piece<scalar_t, 1>, shift_backward_piece<scalar_t, 2>, shift_backward_piece<scalar_t, 3>},
          {pointwise_range<scalar_t, SquaredRelu>, pointwise_range<scalar_t, SquaredReluBackward>,
           pointwise_range<scalar_t, SigmoidGate>, pointwise_range<scalar_t, SigmoidGateBackward>}};
}

}  // namespace vrwkv
}  // namespace

#define VRWKV_DEFINE_KERNELS(isa, scalar_t)                                \
  const vrwkv_cpu::Kernels<scalar_t>& vrwkv_cpu::isa##_kernels(scalar_t) { \
    static constexpr auto kernels = vrwkv::make_kernels<scalar_t>();       \
    return kernels;                                                        \
  }
