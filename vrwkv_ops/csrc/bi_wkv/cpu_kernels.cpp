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

template <typename scalar_t>
constexpr bool kHasFastPath = std::is_same_v<acc_type<scalar_t>, float>;

template <typename scalar_t, bool causal>
struct PassFunctions {
  static constexpr vrwkv_cpu::PassKernels<WkvForwardParams<scalar_t>> forward() {
    using P = WkvForwardParams<scalar_t>;
    return {[](const P& p, int64_t b, int64_t i, int64_t c) {
              const Chunk<scalar_t> chunk(p, b, i, c);
              if constexpr (kHasFastPath<scalar_t>) {
                if (fast_forward_states<causal>(p, chunk)) return;
              }
              forward_states<causal>(p, CarefulChunk(chunk));
            },
            forward_combine<scalar_t, causal>,
            [](const P& p, int64_t b, int64_t i, int64_t c) {
              const Chunk<scalar_t> chunk(p, b, i, c);
              if constexpr (kHasFastPath<scalar_t>) {
                if (fast_forward_outputs<causal>(p, chunk)) return;
              }
              forward_outputs<causal>(p, CarefulChunk(chunk));
            }};
  }
  static constexpr vrwkv_cpu::PassKernels<WkvBackwardParams<scalar_t>> backward() {
    using P = WkvBackwardParams<scalar_t>;
    return {[](const P& p, int64_t b, int64_t i, int64_t c) {
              const Chunk<scalar_t> chunk(p, b, i, c);
              if constexpr (kHasFastPath<scalar_t>) {
                if (fast_backward_states<causal>(p, chunk)) return;
              }
              backward_states<causal>(p, CarefulChunk(chunk));
            },
            backward_combine<scalar_t, causal>,
            [](const P& p, int64_t b, int64_t i, int64_t c) {
              const Chunk<scalar_t> chunk(p, b, i, c);
              if constexpr (kHasFastPath<scalar_t>) {
                if (fast_backward_outputs<causal>(p, chunk)) return;
              }
              backward_outputs<causal>(p, CarefulChunk(chunk));
            }};
  }
};

template <typename scalar_t>
constexpr vrwkv_cpu::WkvKernels<scalar_t> make_table() {
  return {{PassFunctions<scalar_t, false>::forward(), PassFunctions<scalar_t, true>::forward()},
          {PassFunctions<scalar_t, false>::backward(), PassFunctions<scalar_t, true>::backward()}};
}

}  // namespace vrwkv
}  // namespace

VRWKV_DEFINE_CPU_KERNELS(vrwkv_cpu::WkvKernels)

#include "../common/cpu_isa_end.h"
