// Kernels for x86-64 with AVX2 and FMA, whatever the flags of the build: the driver asks the processor.
#if defined(__x86_64__) && defined(__GNUC__)

#define VRWKV_HAS_FMA 1

// Headers of others stay outside the region below: their inline functions must run anywhere.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels_impl.h"

VRWKV_FOR_EACH_SCALAR(VRWKV_DEFINE_KERNELS, avx2)

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
