// The tile algorithm as one instruction set's kernels: the including file chooses it.
#pragma once

#include "kernels.h"

#define VRWKV_TILE_WIDTH vrwkv_cpu::kLanes
#define VRWKV_TILE_TOKENS vrwkv_cpu::kMaxChunk
#include "../tile.h"

namespace {
namespace vrwkv {

template <typename scalar_t, bool causal>
constexpr vrwkv_cpu::Kernels<scalar_t> make_kernels() {
  return {fill_decay<scalar_t>,
          {forward_states<scalar_t, causal>, forward_combine<scalar_t, causal>, forward_outputs<scalar_t, causal>},
          {backward_states<scalar_t, causal>, backward_combine<scalar_t, causal>, backward_outputs<scalar_t, causal>}};
}

}  // namespace vrwkv
}  // namespace

#define VRWKV_DEFINE_KERNELS(isa, scalar_t)                                             \
  const vrwkv_cpu::Kernels<scalar_t>& vrwkv_cpu::isa##_kernels(scalar_t, bool causal) { \
    static constexpr auto full = vrwkv::make_kernels<scalar_t, false>();                \
    static constexpr auto one_sided = vrwkv::make_kernels<scalar_t, true>();            \
    return causal ? one_sided : full;                                                   \
  }
