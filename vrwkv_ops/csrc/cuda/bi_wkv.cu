// Bi-WKV on CUDA: a block of threads takes 32 channels of a tile of tokens, a warp a chunk of 16 of them. A tile is read once
// and stays on the chip; a sequence of one tile takes one kernel. Tiles of longer sequences are scanned on their own, their
// states are joined, and the tiles are read again for the outputs. The arithmetic is in ../block.h, for extreme weights in
// ../tile.h.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_pipeline.h>

#include <algorithm>
#include <limits>

#include "../driver.h"
#include "launch.h"

// What a thread keeps per token of its chunk is in registers.
#define VRWKV_TILE_WIDTH 1
#define VRWKV_TILE_TOKENS 16
#include "../block.h"

// A kernel's parameters stay where they are when their address is taken.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700
#define VRWKV_PARAMETER
#else
#define VRWKV_PARAMETER __grid_constant__
#endif

namespace vrwkv_cuda {
namespace {

using vrwkv::Block;
using vrwkv::kColumns;
using vrwkv::kMaxChunk;
using vrwkv_ops::Backward;
using vrwkv_ops::ceil_div;
using vrwkv_ops::Forward;
using vrwkv_ops::Problem;
using vrwkv_ops::View;

constexpr int kMaxRows = 16;  // warps of a block
constexpr int64_t kMaxGridX = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxGridY = 65535;

// Blocks that a multiprocessor is to hold at the same time, and the warps of a block where a sequence takes many: one loads
// while another computes.
template <typename P>
struct Occupancy;
template <typename scalar_t>
struct Occupancy<Forward<scalar_t>> {
  static constexpr int kBlocks = std::is_same_v<scalar_t, double> ? 1 : 2, kRows = 16;
};
template <typename scalar_t>
struct Occupancy<Backward<scalar_t>> {
  static constexpr int kBlocks = 1, kRows = 8;
};

template <typename scalar_t>
__global__ void __launch_bounds__(kColumns) decay_kernel(const Problem<scalar_t> p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  if (c < p.channels) vrwkv::fill_decay(p, c);
}

// Copies the block's part of a tensor to `to`, 16 bytes at a time where it allows that, and `none` for tokens past the last.
template <typename P, typename scalar_t>
__device__ void load_tile(const Block<P>& block, scalar_t* to, const View<scalar_t>& view, scalar_t none) {
  const int end = block.rows * kMaxChunk * kColumns;
  for (int i = block.tokens * kColumns + threadIdx.x; i < end; i += blockDim.x) to[i] = none;
  constexpr int kPack = kPackLanes<scalar_t>, kPieces = kColumns / kPack;
  const scalar_t* from = view.row(block.b, block.first, block.c);
  if (view.channel_stride == 1 && view.token_stride % kPack == 0 && is_aligned(from) && block.has_column(kColumns - 1)) {
    for (int i = threadIdx.x; i < block.tokens * kPieces; i += blockDim.x) {
      const int t = i / kPieces, column = i % kPieces * kPack;
      __pipeline_memcpy_async(to + t * kColumns + column, from + t * view.token_stride + column, 16);
    }
  } else {
    for (int i = threadIdx.x; i < block.tokens * kColumns; i += blockDim.x) {
      const int t = i / kColumns, column = i % kColumns;
      if (block.has_column(column)) to[i] = from[t * view.token_stride + column * view.channel_stride];
    }
  }
}

// The reverse, for a contiguous tensor of the problem's size.
template <typename P, typename scalar_t>
__device__ void store_tile(const Block<P>& block, scalar_t* tensor, const scalar_t* from) {
  constexpr int kPack = kPackLanes<scalar_t>, kPieces = kColumns / kPack;
  scalar_t* const to = tensor + block.offset(0);
  const int64_t channels = block.p.channels;
  if (channels % kPack == 0 && is_aligned(to) && block.has_column(kColumns - 1)) {
    for (int i = threadIdx.x; i < block.tokens * kPieces; i += blockDim.x) {
      const int t = i / kPieces, column = i % kPieces * kPack;
      *reinterpret_cast<uint4*>(to + t * channels + column) = *reinterpret_cast<const uint4*>(from + t * kColumns + column);
    }
  } else {
    for (int i = threadIdx.x; i < block.tokens * kColumns; i += blockDim.x) {
      const int t = i / kColumns, column = i % kColumns;
      if (block.has_column(column)) to[t * channels + column] = from[i];
    }
  }
}

template <typename scalar_t>
__device__ void load_inputs(const Block<Forward<scalar_t>>& block, bool /*outputs*/) {
  load_tile(block, block.input(vrwkv::kKeys, 0), block.p.k, vrwkv::key_of_none<scalar_t>());
  load_tile(block, block.input(vrwkv::kValues, 0), block.p.v, scalar_t(0));
}

// The states of the backward pass need no keys and values.
template <typename scalar_t>
__device__ void load_inputs(const Block<Backward<scalar_t>>& block, bool outputs) {
  const auto& p = block.p;
  const int64_t image = p.tokens * p.channels;
  const auto contiguous = [&](const auto* data) { return View<std::decay_t<decltype(*data)>>{data, image, p.channels, 1}; };
  const scalar_t zero(0);
  if (outputs) {
    load_tile(block, block.input(vrwkv::kKeys, 0), p.k, vrwkv::key_of_none<scalar_t>());
    load_tile(block, block.input(vrwkv::kValues, 0), p.v, zero);
  }
  load_tile(block, block.input(vrwkv::kGrads, 0), p.gy, zero);
  load_tile(block, block.input(vrwkv::kOutputs, 0), contiguous(p.y), zero);
  if constexpr (sizeof(scalar_t) == 2) load_tile(block, block.input(vrwkv::kResiduals, 0), contiguous(p.y_residual), zero);
  load_tile(block, block.log(0), contiguous(p.z), vrwkv::kLogOfNone);
}

template <typename scalar_t>
__device__ void store_outputs(const Block<Forward<scalar_t>>& block) {
  store_tile(block, block.p.y, block.input(vrwkv::kKeys, 0));
  if (block.p.y_residual) store_tile(block, block.p.y_residual, block.input(vrwkv::kValues, 0));
}

template <typename scalar_t>
__device__ void store_outputs(const Block<Backward<scalar_t>>& block) {
  store_tile(block, block.p.gk, block.input(vrwkv::kKeys, 0));
  store_tile(block, block.p.gv, block.input(vrwkv::kValues, 0));
}

template <typename scalar_t>
__device__ void store_sums(const Block<Forward<scalar_t>>&) {}

// A warp adds up what the chunks of the tile add to gw, another one to gu.
template <typename scalar_t>
__device__ void store_sums(const Block<Backward<scalar_t>>& block) {
  const int column = threadIdx.x % kColumns;
  if (!block.has_column(column)) return;
  for (int which = threadIdx.x / kColumns; which < 2; which += block.rows) {
    auto sum = *block.sum(0, which, column);
    for (int row = 1; row < block.rows; ++row) sum += *block.sum(row, which, column);
    (which == 0 ? block.p.gw : block.p.gu)[(block.b * block.p.chunks + block.tile) * block.p.channels + block.c + column] = sum;
  }
}

// Calls, so that the fast way has its registers for itself; by value, so that its block stays in them.
template <typename Pass>
__device__ __noinline__ void careful_states(Block<typename Pass::P> block, int row, int column) {
  Pass::careful_states(block, row, column);
}
template <typename Pass>
__device__ __noinline__ void careful_outputs(Block<typename Pass::P> block, int row, int column) {
  Pass::careful_outputs(block, row, column);
}

// Without `outputs`, what tiles hold on their own goes to p.states; with it, p.states (if any) is what enters them.
template <typename Pass, bool outputs>
__global__ void __launch_bounds__(kMaxRows* kColumns, Occupancy<typename Pass::P>::kBlocks)
    tile_kernel(const VRWKV_PARAMETER typename Pass::P p, int rows) {
  using Tile = Block<typename Pass::P>;
  extern __shared__ __align__(16) unsigned char memory[];
  const int row = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  const int64_t blocks = p.batch * p.chunks * Tile::column_blocks(p.channels);
  for (int64_t index = blockIdx.x; index < blocks; index += gridDim.x) {
    // Outputs go backwards through the tiles: those whose states came last are still in the L2 cache.
    const Tile block(p, rows, memory, outputs ? blocks - 1 - index : index);
    const bool active = block.has_column(column);
    const auto join = [&](auto number) {
      __syncthreads();
      for (int i = row; active && i < Pass::kDirections; i += rows)
        block.template join<Pass::template State, decltype(number)>(Pass::kFirstDirection + i, column, !outputs);
      __syncthreads();
    };
    const auto start_carefully = [&] {
      if (active) careful_states<Pass>(block, row, column);
      join(0.);
    };
    bool careful = true;
    if constexpr (Tile::kFast) {
      load_inputs(block, outputs);
      __pipeline_commit();
      __pipeline_wait_prior(0);
      __syncthreads();
      const typename Pass::Fast chunk(block, row, column);
      careful = __syncthreads_or(!chunk.fits);
      if (!careful) {
        chunk.states();
        join(0.f);
        if constexpr (outputs) {
          careful = __syncthreads_or(!chunk.outputs_fit());
          if (!careful) {
            chunk.outputs();
            __syncthreads();
            store_outputs(block);
          }
        }
      } else {
        start_carefully();
      }
    } else {
      start_carefully();
    }
    if constexpr (outputs) {
      if (careful && active) careful_outputs<Pass>(block, row, column);
      __syncthreads();
      store_sums(block);
    }
    __syncthreads();  // before the next tile overwrites
  }
}

// A block of threads joins the tiles of 32 channels of one image in one direction, a segment of them to a warp.
template <typename Pass>
__global__ void __launch_bounds__(kColumns* vrwkv::kSegments) join_kernel(const typename Pass::P p) {
  using Segment = vrwkv::Segment<Pass::template State>;
  using Joiner = vrwkv::Joiner<Pass::template State, typename Pass::P>;
  __shared__ __align__(alignof(Segment)) unsigned char memory[sizeof(Segment) * kColumns * vrwkv::kSegments];
  auto* const segments = reinterpret_cast<Segment*>(memory);
  const int column = threadIdx.x % kColumns, segment = threadIdx.x / kColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.y) * kColumns + column;
  for (int64_t i = blockIdx.x; i < p.batch * Pass::kDirections; i += gridDim.x) {
    const int direction = Pass::kFirstDirection + static_cast<int>(i % Pass::kDirections);
    if (c < p.channels) {
      const Joiner joiner(p, i / Pass::kDirections, c, direction, vrwkv::kSegments);
      joiner.sum_up(segment, segments + segment * kColumns + column);
    }
    __syncthreads();
    if (c < p.channels) {
      const Joiner joiner(p, i / Pass::kDirections, c, direction, vrwkv::kSegments);
      joiner.enter(segment, segments + column, kColumns);
    }
    __syncthreads();  // before the next image overwrites
  }
}

template <typename Pass, bool outputs>
void launch_tiles(const typename Pass::P& p, cudaStream_t stream) {
  using Tile = Block<typename Pass::P>;
  const int rows = static_cast<int>(ceil_div(p.chunk_length, kMaxChunk));
  const int bytes = static_cast<int>(Tile::bytes(rows));
  const auto kernel = tile_kernel<Pass, outputs>;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int64_t blocks = std::min(p.batch * p.chunks * Tile::column_blocks(p.channels), kMaxGridX);
  kernel<<<static_cast<unsigned>(blocks), rows * kColumns, bytes, stream>>>(p, rows);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// All on the current stream.
template <typename Pass>
void run_pass(const typename Pass::P& p) {
  const int64_t columns = Block<typename Pass::P>::column_blocks(p.channels);
  TORCH_CHECK(columns <= kMaxGridY, "bi_wkv: expected at most ", kMaxGridY * kColumns, " channels on CUDA, got ", p.channels);
  const auto stream = at::cuda::getCurrentCUDAStream();
  decay_kernel<typename Pass::P::scalar_type><<<static_cast<unsigned>(columns), kColumns, 0, stream>>>(p);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (p.chunks > 1) {
    launch_tiles<Pass, false>(p, stream);
    const auto joins = static_cast<unsigned>(std::min(p.batch * Pass::kDirections, kMaxGridX));
    const dim3 join_grid(joins, static_cast<unsigned>(columns));
    join_kernel<Pass><<<join_grid, kColumns * vrwkv::kSegments, 0, stream>>>(p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  launch_tiles<Pass, true>(p, stream);
}

struct Cuda {
  // A tile is as long as the sequence where a block can hold it.
  template <typename P>
  static vrwkv_ops::Chunking chunking(int64_t tokens) {
    const size_t limit = at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin;
    int rows = kMaxRows;
    while (rows > 1 && Block<P>::bytes(rows) > limit) --rows;
    if (tokens > rows * kMaxChunk) rows = std::min(rows, Occupancy<P>::kRows);
    return {std::min<int64_t>(tokens, rows * kMaxChunk), kMaxChunk + 1};
  }

  template <typename scalar_t>
  static void run(const Forward<scalar_t>& p, bool causal) {
    causal ? run_pass<vrwkv::ForwardPass<scalar_t, true>>(p) : run_pass<vrwkv::ForwardPass<scalar_t, false>>(p);
  }
  template <typename scalar_t>
  static void run(const Backward<scalar_t>& p, bool causal) {
    causal ? run_pass<vrwkv::BackwardPass<scalar_t, true>>(p) : run_pass<vrwkv::BackwardPass<scalar_t, false>>(p);
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> bi_wkv_forward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                                                              const at::Tensor& v, bool causal, bool save) {
  const c10::cuda::CUDAGuard guard(k.device());
  return vrwkv_ops::forward<Cuda>(w, u, k, v, causal, save);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv_backward(const at::Tensor& gy, const at::Tensor& w,
                                                                           const at::Tensor& u, const at::Tensor& k,
                                                                           const at::Tensor& v, const at::Tensor& y,
                                                                           const at::Tensor& y_residual, const at::Tensor& z,
                                                                           bool causal) {
  const c10::cuda::CUDAGuard guard(k.device());
  return vrwkv_ops::backward<Cuda>(gy, w, u, k, v, y, y_residual, z, causal);
}

}  // namespace vrwkv_cuda
