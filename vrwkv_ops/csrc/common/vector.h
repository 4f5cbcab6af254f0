// Vectors of neighbouring channels. On the CPU the compiler turns loops over lanes into SIMD code; on CUDA a thread has one
// vector.
#pragma once

#include <cstdint>
#include <type_traits>

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

#if defined(VRWKV_CPU_AVX2) || defined(VRWKV_CPU_AVX512)
// c10's types convert one by one, c10::Half even in software: flags of the build need not have F16C.
VRWKV_FN __m128i load_half(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
VRWKV_FN __m256 widen(const c10::Half* from) { return _mm256_cvtph_ps(load_half(from)); }
VRWKV_FN __m256 widen(const c10::BFloat16* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(from)), 16));
}
VRWKV_FN __m128i narrow(__m256 x, c10::Half) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
VRWKV_FN __m128i narrow(__m256 x, c10::BFloat16) {
  const __m256i bits = _mm256_castps_si256(x), is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), is_odd);  // ties go to even
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16), nan = _mm256_set1_epi32(0x7fc0);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, nan, is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}
#endif

template <typename To, typename From>
VRWKV_FN To cast(From x) {
#if defined(VRWKV_CPU_AVX2) || defined(VRWKV_CPU_AVX512)
  if constexpr (std::is_same_v<From, c10::Half> && std::is_same_v<To, float>) return _cvtsh_ss(x.x);
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, c10::Half>)
    return {_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT), c10::Half::from_bits()};
#endif
  return static_cast<To>(x);
}

template <int kCount, typename To, typename From>
VRWKV_FN void cast_lanes(To* to, const From* from) {
#if defined(VRWKV_CPU_AVX2) || defined(VRWKV_CPU_AVX512)
  if constexpr (kCount % 8 == 0 && std::is_same_v<To, float> && sizeof(From) == 2) {
    for (int j = 0; j < kCount; j += 8) _mm256_storeu_ps(to + j, widen(from + j));
    return;
  }
  if constexpr (kCount % 8 == 0 && std::is_same_v<From, float> && sizeof(To) == 2) {
    for (int j = 0; j < kCount; j += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), narrow(_mm256_loadu_ps(from + j), To()));
    return;
  }
#endif
  for (int j = 0; j < kCount; ++j) to[j] = cast<To>(from[j]);
}

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
    cast_lanes<kLanes>(to.x, from);
  } else {
    for (int j = 0; j < count; ++j) to.x[j] = cast<T>(from[j * stride]);
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
    cast_lanes<kLanes>(to, from.x);
  } else {
    for (int j = 0; j < count; ++j) to[j] = cast<scalar_t>(from.x[j]);
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
