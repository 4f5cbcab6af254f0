// Bi-WKV kernels for one CPU instruction set: the build compiles this file once for each (common/cpu_isa.h).
#include "cpu_kernels.h"

#include "../common/cpu_isa_begin.h"

#define VRWKV_CHUNK_CHANNELS vrwkv_cpu::kLanes
#define VRWKV_CHUNK_TOKENS vrwkv_cpu::kMaxChunk
#include "fast_chunk.h"

namespace {
namespace vrwkv {

// A chunk with a table of e^(w n), for any weights.
template <typename scalar_t>
struct CarefulChunk : Chunk<scalar_t> {
  using T = acc_type<scalar_t>;
  DecayVector<T> decay[kMaxChunk + 1];

  explicit CarefulChunk(const Chunk<scalar_t>& of) : Chunk<scalar_t>(of) {
    for (int n = 0; n <= this->length; ++n) {
      for (int j = 0; j < this->count; ++j) decay[n].set(j, Decay<T>::of(this->problem.w[this->c + j], n));
    }
  }
  VRWKV_FN void read_decay(DecayVector<T>& to, int n) const { to = decay[n]; }
};

// The kernels of a pass: the fast path, and the careful one where that does not apply.
template <bool causal, typename P>
constexpr vrwkv_cpu::PassKernels<P> pass_kernels() {
  using scalar_t = typename P::scalar_type;
  constexpr bool kHasFastPath = std::is_same_v<acc_type<scalar_t>, float>;
  return {[](const P& p, int64_t b, int64_t i, int64_t c) {
            const Chunk<scalar_t> chunk(p, b, i, c);
            if constexpr (kHasFastPath) {
              if (fast_states<causal>(p, chunk)) return;
            }
            careful_states<causal>(p, CarefulChunk(chunk));
          },
          combine<causal, scalar_t>,
          [](const P& p, int64_t b, int64_t i, int64_t c) {
            const Chunk<scalar_t> chunk(p, b, i, c);
            if constexpr (kHasFastPath) {
              if (fast_outputs<causal>(p, chunk)) return;
            }
            careful_outputs<causal>(p, CarefulChunk(chunk));
          }};
}

template <typename scalar_t>
constexpr vrwkv_cpu::WkvKernels<scalar_t> make_table() {
  using Forward = WkvForwardParams<scalar_t>;
  using Backward = WkvBackwardParams<scalar_t>;
  return {{pass_kernels<false, Forward>(), pass_kernels<true, Forward>()},
          {pass_kernels<false, Backward>(), pass_kernels<true, Backward>()}};
}

}  // namespace vrwkv
}  // namespace

VRWKV_DEFINE_CPU_KERNELS(vrwkv_cpu::WkvKernels)

#include "../common/cpu_isa_end.h"
