// Launch sizes and indices of element-wise CUDA kernels.
#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <cstdint>

namespace vrwkv_cuda {

constexpr int kBlockThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // a thread of a larger problem takes several items

inline unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::min((threads + kBlockThreads - 1) / kBlockThreads, kMaxBlocks));
}

__device__ inline int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x; }
__device__ inline int64_t item_stride() { return static_cast<int64_t>(gridDim.x) * kBlockThreads; }

// Elements that a thread reads or writes in one instruction of 16 bytes.
template <typename scalar_t>
constexpr int kPackLanes = 16 / sizeof(scalar_t);

__host__ __device__ inline bool is_aligned(const void* data, int bytes = 16) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

}  // namespace vrwkv_cuda
