// What the driver (bi_wkv.cpp) and the kernels of each instruction set agree on.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace vrwkv_cpu {

// Channels that one kernel call handles, and the most tokens in a chunk: its scratch stays in the L2 cache.
constexpr int64_t kLanes = 32;
constexpr int64_t kMaxChunk = 256;

template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// A (B, T, C) tensor of any strides, read in place.
template <typename scalar_t>
struct View {
  const scalar_t* data;
  int64_t batch_stride, token_stride, channel_stride;

  const scalar_t* row(int64_t b, int64_t t, int64_t c) const {
    return data + b * batch_stride + t * token_stride + c * channel_stride;
  }
};

// The sequence is cut into chunks of `chunk_length` tokens (the last one may be shorter). `decay` holds, for each column of a
// row of decay powers and each n up to chunk_length, C values; `states`, for each direction, state field, image and chunk,
// C values (null when there is a single chunk).
template <typename scalar_t>
struct Problem {
  using scalar_type = scalar_t;
  using acc_t = acc_type<scalar_t>;
  int64_t batch, tokens, channels;
  int64_t chunk_length, chunks;
  const acc_t* w;
  const acc_t* u;
  View<scalar_t> k, v;
  acc_t* decay;
  acc_t* states;
};

template <typename scalar_t>
struct Forward : Problem<scalar_t> {
  using acc_t = acc_type<scalar_t>;
  scalar_t* y;           // (B, T, C), contiguous, as are the two below
  scalar_t* y_residual;  // null unless wanted
  acc_t* z;              // null unless wanted
};

template <typename scalar_t>
struct Backward : Problem<scalar_t> {
  using acc_t = acc_type<scalar_t>;
  View<scalar_t> gy;
  const scalar_t* y;
  const scalar_t* y_residual;  // null for float and double
  const acc_t* z;
  scalar_t* gk;
  scalar_t* gv;
  acc_t* gw;  // (B, chunks, C): summed by the driver, in order
  acc_t* gu;
};

constexpr int kDecayColumns = 3;    // power, inverse, exponent
constexpr int kForwardFields = 3;   // of WkvState
constexpr int kBackwardFields = 5;  // of GradState

// For one block of channels starting at c: `decay` fills the table, `states` scans a chunk, `combine` turns the states of
// chunks into those that enter each chunk, `outputs` does the rest.
template <typename scalar_t>
struct Kernels {
  using ForwardStep = void (*)(const Forward<scalar_t>&, int64_t b, int64_t chunk, int64_t c);
  using BackwardStep = void (*)(const Backward<scalar_t>&, int64_t b, int64_t chunk, int64_t c);
  void (*decay)(const Problem<scalar_t>&, int64_t c);
  ForwardStep forward_states, forward_outputs;
  void (*forward_combine)(const Forward<scalar_t>&, int64_t b, int64_t c);
  BackwardStep backward_states, backward_outputs;
  void (*backward_combine)(const Backward<scalar_t>&, int64_t b, int64_t c);
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
