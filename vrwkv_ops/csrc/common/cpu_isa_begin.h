// Begins the part of a file that is compiled for the instruction set of VRWKV_CPU_AVX2 or VRWKV_CPU_AVX512, for any flags of
// the build. Headers of others must be included before: their inline functions must run on any processor.
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu_isa.h"

#if defined(VRWKV_CPU_AVX512) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), apply_to = function)
#elif defined(VRWKV_CPU_AVX512)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#elif defined(VRWKV_CPU_AVX2) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(VRWKV_CPU_AVX2)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

// g++ would copy a vector in halves through memcpy; loading it whole right after would wait for the stores.
#if (defined(VRWKV_CPU_AVX2) || defined(VRWKV_CPU_AVX512)) && !defined(__clang__)
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif
