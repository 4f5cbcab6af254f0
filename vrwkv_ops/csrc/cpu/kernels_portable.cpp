// Kernels for any processor.
#include "kernels_impl.h"

VRWKV_FOR_EACH_SCALAR(VRWKV_DEFINE_KERNELS, portable)
