// Tables of CPU kernels, one for each instruction set; cpu_dispatch.h chooses.
//
// The build compiles an operator's cpu_kernels.cpp once for each instruction set, with VRWKV_CPU_AVX2, VRWKV_CPU_AVX512 or
// neither defined. Each time it defines the operator's table of kernels for that instruction set.
#pragma once

#include "tensor_view.h"

namespace vrwkv_cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

#if defined(VRWKV_CPU_AVX512)
constexpr Isa kCompiledIsa = Isa::kAvx512;
#elif defined(VRWKV_CPU_AVX2)
constexpr Isa kCompiledIsa = Isa::kAvx2;
#else
constexpr Isa kCompiledIsa = Isa::kPortable;
#endif

// `Table` is an operator's struct of function pointers for one type of element.
template <typename Table, Isa isa>
const Table& cpu_kernels_for();

}  // namespace vrwkv_cpu

#define VRWKV_DEFINE_TABLE(Table, scalar_t)                                                       \
  template <>                                                                                     \
  const Table<scalar_t>& vrwkv_cpu::cpu_kernels_for<Table<scalar_t>, vrwkv_cpu::kCompiledIsa>() { \
    static constexpr Table<scalar_t> table = vrwkv::make_table<scalar_t>();                       \
    return table;                                                                                 \
  }

// Defines the tables of the instruction set that this file is compiled for, from vrwkv::make_table<scalar_t>().
#define VRWKV_DEFINE_CPU_KERNELS(Table) \
  VRWKV_DEFINE_TABLE(Table, float)      \
  VRWKV_DEFINE_TABLE(Table, double)     \
  VRWKV_DEFINE_TABLE(Table, c10::Half)  \
  VRWKV_DEFINE_TABLE(Table, c10::BFloat16)
