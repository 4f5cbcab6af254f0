// The Bi-WKV kernels of one CPU instruction set, as cpu.cpp calls them.
#pragma once

#include "../common/cpu_isa.h"
#include "params.h"

namespace vrwkv_cpu {

using vrwkv_ops::WkvBackwardParams;
using vrwkv_ops::WkvForwardParams;

// Channels of one call, and the largest number of tokens in a chunk, whose scratch memory fits the L2 cache.
constexpr int kLanes = 32;
constexpr int kMaxChunk = 256;

// Kernels for one block of channels that starts at c: `states` scans a chunk on its own, `combine` replaces the state of each
// chunk by the state that enters it, `outputs` computes the results.
template <typename P>
struct PassKernels {
  void (*states)(const P&, int64_t b, int64_t chunk, int64_t c);
  void (*combine)(const P&, int64_t b, int64_t c);
  void (*outputs)(const P&, int64_t b, int64_t chunk, int64_t c);
};

// The arrays are indexed by `causal`.
template <typename scalar_t>
struct WkvKernels {
  PassKernels<WkvForwardParams<scalar_t>> forward[2];
  PassKernels<WkvBackwardParams<scalar_t>> backward[2];
};

}  // namespace vrwkv_cpu
