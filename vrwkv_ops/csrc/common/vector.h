// Vectors of neighbouring channels. On the CPU the compiler turns loops over lanes into SIMD code; on CUDA a thread has one
// vector.
#pragma once

#include <cstdint>

#include "compiler.h"

// Internal linkage: every CPU instruction set compiles its own copy.
namespace {
namespace vrwkv {

template <typename T, int kLanes>
struct alignas(kLanes % 16 == 0 ? 64 : sizeof(T)) Vector {
  T x[kLanes] = {};
};

// A vector that a CUDA thread reads or writes in one instruction.
template <typename scalar_t, int kLanes>
struct alignas(sizeof(scalar_t) * kLanes) Pack {
  scalar_t x[kLanes];
};

// Loads `count` lanes; the others keep their values. On CUDA vectors of several lanes are whole, contiguous and aligned.
template <typename T, int kLanes, typename scalar_t>
VRWKV_FN void load(Vector<T, kLanes>& to, const scalar_t* from, int64_t stride, int count) {
#if defined(__CUDA_ARCH__)
  if constexpr (kLanes > 1) {
    const auto pack = *reinterpret_cast<const Pack<scalar_t, kLanes>*>(from);
    for (int j = 0; j < kLanes; ++j) to.x[j] = static_cast<T>(pack.x[j]);
    return;
  }
#endif
  if (stride == 1 && count == kLanes) {
    for (int j = 0; j < kLanes; ++j) to.x[j] = static_cast<T>(from[j]);
  } else {
    for (int j = 0; j < count; ++j) to.x[j] = static_cast<T>(from[j * stride]);
  }
}

template <typename T, int kLanes, typename scalar_t>
VRWKV_FN void store(scalar_t* to, const Vector<T, kLanes>& from, int count) {
#if defined(__CUDA_ARCH__)
  if constexpr (kLanes > 1) {
    Pack<scalar_t, kLanes> pack;
    for (int j = 0; j < kLanes; ++j) pack.x[j] = static_cast<scalar_t>(from.x[j]);
    *reinterpret_cast<Pack<scalar_t, kLanes>*>(to) = pack;
    return;
  }
#endif
  if (count == kLanes) {
    for (int j = 0; j < kLanes; ++j) to[j] = static_cast<scalar_t>(from.x[j]);
  } else {
    for (int j = 0; j < count; ++j) to[j] = static_cast<scalar_t>(from.x[j]);
  }
}

// Prefetches a vector that will be read or written.
template <int kLanes, bool for_write, typename scalar_t>
VRWKV_FN void prefetch(const scalar_t* block) {
#if defined(__GNUC__) && !defined(__CUDA_ARCH__)
  constexpr int kLine = 64 / sizeof(scalar_t);
  for (int j = 0; j < kLanes; j += kLine) __builtin_prefetch(block + j, for_write);
#endif
}

}  // namespace vrwkv
}  // namespace
