// VRWKV_FN marks a function that is inlined everywhere and runs on the CPU and on CUDA alike.
#pragma once

#if defined(__CUDACC__)
#define VRWKV_FN __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define VRWKV_FN __forceinline
#else
#define VRWKV_FN inline __attribute__((always_inline))
#endif
