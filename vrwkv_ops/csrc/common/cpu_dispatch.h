// The choice among the CPU kernels of several instruction sets.
#pragma once

#include <ATen/Version.h>

#include <string>

#include "cpu_isa.h"

namespace vrwkv_cpu {

// The instruction set that PyTorch uses; the environment variable ATEN_CPU_CAPABILITY overrides it.
inline Isa cpu_isa() {
  static const std::string name = at::get_cpu_capability();
  static const Isa found = name == "AVX512" ? Isa::kAvx512 : (name == "AVX2" ? Isa::kAvx2 : Isa::kPortable);
  return found;
}

template <typename Table>
const Table& cpu_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == Isa::kAvx512) return cpu_kernels_for<Table, Isa::kAvx512>();
  if (cpu_isa() == Isa::kAvx2) return cpu_kernels_for<Table, Isa::kAvx2>();
#endif
  return cpu_kernels_for<Table, Isa::kPortable>();
}

}  // namespace vrwkv_cpu
