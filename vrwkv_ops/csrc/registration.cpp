// Kernels for the operators that src/vrwkv_ops/ops.py defines.
#include <torch/library.h>

#include "ops.h"

#define VRWKV_REGISTER(KEY, device)                       \
  TORCH_LIBRARY_IMPL(vrwkv_ops, KEY, m) {                 \
    m.impl("bi_wkv_forward", vrwkv_##device::bi_wkv_forward);   \
    m.impl("bi_wkv_backward", vrwkv_##device::bi_wkv_backward); \
    m.impl("q_shift", vrwkv_##device::q_shift);           \
  }

// Compiled into either of two modules, so that each can be built, and fail, without the other.
#if defined(VRWKV_OPS_WITH_CUDA)
VRWKV_REGISTER(CUDA, cuda)
#else
VRWKV_REGISTER(CPU, cpu)
#endif
