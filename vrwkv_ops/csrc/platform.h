// VRWKV_FN marks a function that is inlined everywhere and runs on the CPU and on CUDA alike.
#pragma once

#if defined(__CUDACC__)
#define VRWKV_FN __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define VRWKV_FN __forceinline
#else
#define VRWKV_FN inline __attribute__((always_inline))
#endif

// The same of a lambda on the CPU.
#if defined(__GNUC__)
#define VRWKV_INLINE_LAMBDA __attribute__((always_inline))
#else
#define VRWKV_INLINE_LAMBDA
#endif

// Whether a fused multiply-add is one instruction. The files of instruction sets say so themselves: g++ up to 13 does not
// define __FMA__ where a pragma chooses the target.
#if !defined(VRWKV_HAS_FMA)
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define VRWKV_HAS_FMA 1
#else
#define VRWKV_HAS_FMA 0
#endif
#endif
