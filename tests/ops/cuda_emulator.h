// Runs CUDA kernels on the CPU: the threads of a block take turns and meet at its barriers. It knows what csrc/*/cuda.cu uses. Test
// code puts it in the place of CUDA's and PyTorch's CUDA headers, and turns launches into calls of emulator::launch.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // blocks come one after the other
#define C10_CUDA_CHECK(expression) (expression)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(int64_t x_size = 1, int64_t y_size = 1) : x(static_cast<unsigned>(x_size)), y(static_cast<unsigned>(y_size)) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = int;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulator {

inline size_t shared_limit = 227 << 10;                                  // of an H100
inline std::map<std::pair<const void*, size_t>, size_t> allowed_shared;  // by kernel and device, which its limit names
inline unsigned char* dynamic_memory;
inline int64_t careful_calls, launches;
inline bool is_reversed;  // Whether the last thread comes first. A result that changes shows a barrier that is missing.

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline size_t current;
inline const void* body;
inline void (*call_body)(const void*);

// A round runs every thread up to its next barrier.
inline int vote, last_vote, waiting_here, waiting_with_vote;

inline void enter() {
  call_body(body);
  threads[current].done = true;
  // The context's link leads back to the scheduler.
}

inline void wait() { swapcontext(&threads[current].context, &scheduler); }

inline void run_block(size_t count) {
  constexpr size_t kStack = 256 << 10;
  if (threads.size() < count) threads.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
  }
  for (size_t done = 0; done < count;) {
    waiting_here = waiting_with_vote = vote = 0;
    for (size_t i = 0; i < count; ++i) {
      current = is_reversed ? count - 1 - i : i;
      threadIdx.x = static_cast<unsigned>(current);
      swapcontext(&scheduler, &threads[current].context);
      done += threads[current].done;
    }
    last_vote = vote;
    const auto all = static_cast<int>(count);
    TORCH_CHECK(done == count || (done == 0 && (waiting_here == all || waiting_with_vote == all)),
                "the threads of a block do not meet at one barrier: ", done, " of ", count, " are through, ", waiting_here,
                " and ", waiting_with_vote, " wait");
  }
}

template <typename Body>
void launch(dim3 grid, int64_t count, size_t bytes, cudaStream_t, const Body& kernel, const void* address = nullptr) {
  constexpr size_t kGuard = 64;
  const auto found = allowed_shared.find({address, shared_limit});
  const size_t allowed = found == allowed_shared.end() ? 48 << 10 : found->second;
  TORCH_CHECK(grid.x >= 1 && grid.y >= 1 && grid.y <= 65535 && count >= 1 && count <= 1024 && bytes <= allowed,
              "no such launch: ", grid.x, " x ", grid.y, " blocks of ", count, " threads with ", bytes, " bytes");
  ++launches;
  std::vector<uint4> memory((bytes + kGuard) / sizeof(uint4) + 1);
  dynamic_memory = reinterpret_cast<unsigned char*>(memory.data());
  gridDim = grid, blockDim = dim3(count);
  body = &kernel;
  call_body = [](const void* which) { (*static_cast<const Body*>(which))(); };
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      std::memset(dynamic_memory, 0xff, bytes + kGuard);  // NaN in all types
      run_block(count);
      for (size_t i = 0; i < kGuard; ++i)
        TORCH_CHECK(dynamic_memory[bytes + i] == 0xff, "a write past the ", bytes, " bytes of shared memory");
    }
  }
}

struct Properties {
  size_t sharedMemPerBlockOptin = shared_limit;
};

}  // namespace emulator

inline void __syncthreads() {
  ++emulator::waiting_here;
  emulator::wait();
}
inline int __syncthreads_or(int value) {
  emulator::vote |= value != 0;
  ++emulator::waiting_with_vote;
  emulator::wait();
  return emulator::last_vote;
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T old = *to;
  *to += value;
  return old;
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % bytes == 0 && reinterpret_cast<uintptr_t>(from) % bytes == 0, "a copy of ",
              bytes, " bytes that is not aligned");
  std::memcpy(to, from, bytes);
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {}

template <typename Kernel>
void cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  TORCH_CHECK(static_cast<size_t>(bytes) <= emulator::shared_limit, "too much shared memory: ", bytes);
  emulator::allowed_shared[{reinterpret_cast<const void*>(kernel), emulator::shared_limit}] = bytes;
}

namespace at::cuda {
inline cudaStream_t getCurrentCUDAStream() { return 0; }
inline std::unique_ptr<emulator::Properties> getCurrentDeviceProperties() { return std::make_unique<emulator::Properties>(); }
}  // namespace at::cuda

namespace c10::cuda {
// Every limit of shared memory is another device.
inline int current_device() {
  static std::vector<size_t> limits;
  const auto found = std::find(limits.begin(), limits.end(), emulator::shared_limit);
  const auto device = static_cast<int>(found - limits.begin());
  if (found == limits.end()) limits.push_back(emulator::shared_limit);
  return device;
}

struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
}  // namespace c10::cuda
