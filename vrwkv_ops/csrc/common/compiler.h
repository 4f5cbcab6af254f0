// VRWKV_FN marks a function that runs on the CPU and on CUDA and is always inlined.
#pragma once

#if defined(__CUDACC__)
#define VRWKV_FN __host__ __device__ __forceinline__
#else
#define VRWKV_FN inline __attribute__((always_inline))
#endif

// The same for a lambda, on the CPU.
#define VRWKV_INLINE_LAMBDA __attribute__((always_inline))

// Before a loop over lanes: g++ makes SIMD code of loops, and less of it once they are unrolled.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define VRWKV_LANE_LOOP _Pragma("GCC unroll 1")
#else
#define VRWKV_LANE_LOOP
#endif

// Whether a fused multiply-add is one instruction. g++ up to 13 does not define __FMA__ where a pragma chooses the target.
#if !defined(VRWKV_HAS_FMA)
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(VRWKV_CPU_AVX2) || \
    defined(VRWKV_CPU_AVX512)
#define VRWKV_HAS_FMA 1
#else
#define VRWKV_HAS_FMA 0
#endif
#endif
