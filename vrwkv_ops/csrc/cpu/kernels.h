// One instruction set's kernels, as the drivers (bi_wkv.cpp, shift.cpp, pointwise.cpp) call them.
#pragma once

#include "../problem.h"

namespace vrwkv_cpu {

using vrwkv_ops::Backward;
using vrwkv_ops::Forward;
using vrwkv_ops::Pointwise;
using vrwkv_ops::Problem;
using vrwkv_ops::ShiftBackward;
using vrwkv_ops::ShiftForward;

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

// Arrays by `causal`, by the number of mixes less one, and by function.
template <typename scalar_t>
struct Kernels {
  void (*decay)(const Problem<scalar_t>&, int64_t c);
  Steps<Forward<scalar_t>> forward[2];
  Steps<Backward<scalar_t>> backward[2];
  void (*shift_forward[vrwkv_ops::kMaxMixes])(const ShiftForward<scalar_t>&, int64_t first_row, int64_t last_row);
  void (*shift_backward[vrwkv_ops::kMaxMixes])(const ShiftBackward<scalar_t>&, int64_t piece);
  void (*pointwise[vrwkv_ops::kPointwiseFunctions])(const Pointwise<scalar_t>&, int64_t begin, int64_t end);
};

#define VRWKV_DECLARE_KERNELS(isa, scalar_t) const Kernels<scalar_t>& isa##_kernels(scalar_t);
#define VRWKV_FOR_EACH_SCALAR(M, isa) \
  M(isa, float)                       \
  M(isa, double)                      \
  M(isa, c10::Half)                   \
  M(isa, c10::BFloat16)

VRWKV_FOR_EACH_SCALAR(VRWKV_DECLARE_KERNELS, portable)
VRWKV_FOR_EACH_SCALAR(VRWKV_DECLARE_KERNELS, avx2)
VRWKV_FOR_EACH_SCALAR(VRWKV_DECLARE_KERNELS, avx512)

// Those of PyTorch's own choice, which the environment variable ATEN_CPU_CAPABILITY overrides.
enum class Capability { kPortable, kAvx2, kAvx512 };
Capability capability();

template <typename scalar_t>
const Kernels<scalar_t>& kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (capability() == Capability::kAvx512) return avx512_kernels(scalar_t());
  if (capability() == Capability::kAvx2) return avx2_kernels(scalar_t());
#endif
  return portable_kernels(scalar_t());
}

}  // namespace vrwkv_cpu
