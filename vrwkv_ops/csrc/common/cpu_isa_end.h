// Ends what cpu_isa_begin.h began.
#if defined(VRWKV_CPU_AVX2) || defined(VRWKV_CPU_AVX512)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
