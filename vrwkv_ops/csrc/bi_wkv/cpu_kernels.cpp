// Bi-WKV kernels for one CPU instruction set: the build compiles this file once for each (common/cpu_isa.h).
#include "cpu_kernels.h"

#include "../common/cpu_isa_begin.h"

#define VRWKV_CHUNK_CHANNELS vrwkv_cpu::kLanes
#define VRWKV_CHUNK_TOKENS vrwkv_cpu::kMaxChunk
#include "chunk.h"

namespace {
namespace vrwkv {

template <typename scalar_t, bool causal>
struct PassFunctions {
  using Chunk = vrwkv::Chunk<scalar_t>;

  static constexpr vrwkv_cpu::PassKernels<WkvForwardParams<scalar_t>> forward() {
    using P = WkvForwardParams<scalar_t>;
    return {[](const P& p, int64_t b, int64_t i, int64_t c) { forward_states<causal>(p, Chunk(p, b, i, c)); },
            forward_combine<scalar_t, causal>,
            [](const P& p, int64_t b, int64_t i, int64_t c) { forward_outputs<causal>(p, Chunk(p, b, i, c)); }};
  }
  static constexpr vrwkv_cpu::PassKernels<WkvBackwardParams<scalar_t>> backward() {
    using P = WkvBackwardParams<scalar_t>;
    return {[](const P& p, int64_t b, int64_t i, int64_t c) { backward_states<causal>(p, Chunk(p, b, i, c)); },
            backward_combine<scalar_t, causal>,
            [](const P& p, int64_t b, int64_t i, int64_t c) { backward_outputs<causal>(p, Chunk(p, b, i, c)); }};
  }
};

template <typename scalar_t>
constexpr vrwkv_cpu::WkvKernels<scalar_t> make_table() {
  return {fill_decay<scalar_t>,
          {PassFunctions<scalar_t, false>::forward(), PassFunctions<scalar_t, true>::forward()},
          {PassFunctions<scalar_t, false>::backward(), PassFunctions<scalar_t, true>::backward()}};
}

}  // namespace vrwkv
}  // namespace

VRWKV_DEFINE_CPU_KERNELS(vrwkv_cpu::WkvKernels)

#include "../common/cpu_isa_end.h"
