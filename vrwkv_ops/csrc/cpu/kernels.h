// One instruction set's kernels, as the driver (bi_wkv.cpp) calls them.
#pragma once

#include "../problem.h"

namespace vrwkv_cpu {

using vrwkv_ops::Backward;
using vrwkv_ops::Forward;
using vrwkv_ops::Problem;

// Channels that one call handles, and the most tokens in a chunk: its scratch stays in the L2 cache.
constexpr int kLanes = 32;
constexpr int kMaxChunk = 256;

// For one block of channels starting at c: `states` scans a chunk, `combine` turns the states of chunks into those that enter
// each chunk, `outputs` does the rest.
template <typename P>
struct Steps {
  void (*states)(const P&, int64_t b, int64_t chunk, int64_t c);
  void (*combine)(const P&, int64_t b, int64_t c);
  void (*outputs)(const P&, int64_t b, int64_t chunk, int64_t c);
};

template <typename scalar_t>
struct Kernels {
  void (*decay)(const Problem<scalar_t>&, int64_t c);
  Steps<Forward<scalar_t>> forward;
  Steps<Backward<scalar_t>> backward;
};

#define VRWKV_DECLARE_KERNELS(isa, scalar_t) const Kernels<scalar_t>& isa##_kernels(scalar_t, bool causal);
#define VRWKV_FOR_EACH_SCALAR(M, isa) \
  M(isa, float)                       \
  M(isa, double)                      \
  M(isa, c10::Half)                   \
  M(isa, c10::BFloat16)

VRWKV_FOR_EACH_SCALAR(VRWKV_DECLARE_KERNELS, portable)
VRWKV_FOR_EACH_SCALAR(VRWKV_DECLARE_KERNELS, avx2)
VRWKV_FOR_EACH_SCALAR(VRWKV_DECLARE_KERNELS, avx512)

}  // namespace vrwkv_cpu
