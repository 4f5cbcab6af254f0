// Bi-WKV on CUDA: a block of threads takes a tile of tokens and 32 channels, a warp a chunk of 16 tokens. A tile is read once
// into shared memory; a sequence of one tile takes one kernel. In longer sequences each tile is scanned on its own, the states
// of the tiles are joined, and the tiles are read again for the outputs. The arithmetic is in shared_tile.h, for extreme
// weights in chunk.h.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_pipeline.h>

#include <algorithm>
#include <array>
#include <limits>
#include <mutex>

#include "../common/cuda_launch.h"
#include "../operators.h"
#include "host.h"

// A thread keeps its chunk in registers.
#define VRWKV_CHUNK_CHANNELS 1
#define VRWKV_CHUNK_TOKENS 16
#include "shared_tile.h"

namespace vrwkv_cuda {
namespace {

using vrwkv::kColumns;
using vrwkv::kMaxChunk;
using vrwkv::SharedChunk;
using vrwkv::SharedTile;
using vrwkv_ops::ceil_div;
using vrwkv_ops::View;
using vrwkv_ops::WkvBackwardParams;
using vrwkv_ops::WkvForwardParams;

constexpr int kMaxRows = 16;  // warps of a block
constexpr int64_t kMaxGridX = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxGridY = 65535;
constexpr int kMaxDevices = 128;

// Blocks that a multiprocessor holds at the same time, so that one loads while another computes, and the warps of a block if a
// sequence has several tiles.
template <typename P>
struct Occupancy;
template <typename scalar_t>
struct Occupancy<WkvForwardParams<scalar_t>> {
  static constexpr int kBlocks = std::is_same_v<scalar_t, double> ? 1 : 2, kRows = 16;
};
template <typename scalar_t>
struct Occupancy<WkvBackwardParams<scalar_t>> {
  static constexpr int kBlocks = 1, kRows = 8;
};

// Copies the tile of a tensor to `to`, 16 bytes at a time if the tensor allows that, and fills tokens past the last with
// `none`.
template <typename P, typename scalar_t>
__device__ void load_tile(const SharedTile<P>& tile, scalar_t* to, const View<scalar_t>& view, scalar_t none) {
  const int end = tile.rows * kMaxChunk * kColumns;
  for (int i = tile.tokens * kColumns + threadIdx.x; i < end; i += blockDim.x) to[i] = none;
  constexpr int kPack = kPackLanes<scalar_t>, kPieces = kColumns / kPack;
  const scalar_t* from = view.row(tile.b, tile.first, tile.c);
  if (view.channel_stride == 1 && view.token_stride % kPack == 0 && is_aligned(from) && tile.has_column(kColumns - 1)) {
    for (int i = threadIdx.x; i < tile.tokens * kPieces; i += blockDim.x) {
      const int t = i / kPieces, column = i % kPieces * kPack;
      __pipeline_memcpy_async(to + t * kColumns + column, from + t * view.token_stride + column, 16);
    }
  } else {
    for (int i = threadIdx.x; i < tile.tokens * kColumns; i += blockDim.x) {
      const int t = i / kColumns, column = i % kColumns;
      if (tile.has_column(column)) to[i] = from[t * view.token_stride + column * view.channel_stride];
    }
  }
}

// Copies a tile to a contiguous tensor, but for rows whose results are there already.
template <typename P, typename scalar_t>
__device__ void store_tile(const SharedTile<P>& tile, scalar_t* tensor, const scalar_t* from,
                           const bool (&is_stored)[kMaxRows]) {
  constexpr int kPack = kPackLanes<scalar_t>, kPieces = kColumns / kPack;
  scalar_t* const to = tensor + tile.offset(0);
  const int64_t channels = tile.p.channels;
  if (channels % kPack == 0 && is_aligned(to) && tile.has_column(kColumns - 1)) {
    for (int i = threadIdx.x; i < tile.tokens * kPieces; i += blockDim.x) {
      const int t = i / kPieces, column = i % kPieces * kPack;
      if (is_stored[t / kMaxChunk]) continue;
      *reinterpret_cast<uint4*>(to + t * channels + column) = *reinterpret_cast<const uint4*>(from + t * kColumns + column);
    }
  } else {
    for (int i = threadIdx.x; i < tile.tokens * kColumns; i += blockDim.x) {
      const int t = i / kColumns, column = i % kColumns;
      if (tile.has_column(column) && !is_stored[t / kMaxChunk]) to[t * channels + column] = from[i];
    }
  }
}

template <typename scalar_t>
__device__ void load_inputs(const SharedTile<WkvForwardParams<scalar_t>>& tile, bool /*outputs*/) {
  load_tile(tile, tile.input(vrwkv::kKeys, 0), tile.p.k, vrwkv::padding_key<scalar_t>());
  load_tile(tile, tile.input(vrwkv::kValues, 0), tile.p.v, scalar_t(0));
}

// The states of the backward pass do not need keys and values.
template <typename scalar_t>
__device__ void load_inputs(const SharedTile<WkvBackwardParams<scalar_t>>& tile, bool outputs) {
  const auto& p = tile.p;
  const int64_t image = p.tokens * p.channels;
  const auto contiguous = [&](const auto* data) { return View<std::decay_t<decltype(*data)>>{data, image, p.channels, 1}; };
  const scalar_t zero(0);
  if (outputs) {
    load_tile(tile, tile.input(vrwkv::kKeys, 0), p.k, vrwkv::padding_key<scalar_t>());
    load_tile(tile, tile.input(vrwkv::kValues, 0), p.v, zero);
  }
  load_tile(tile, tile.input(vrwkv::kGrads, 0), p.gy, zero);
  load_tile(tile, tile.input(vrwkv::kOutputs, 0), contiguous(p.y), zero);
  if constexpr (sizeof(scalar_t) == 2) load_tile(tile, tile.input(vrwkv::kResiduals, 0), contiguous(p.y_residual), zero);
  load_tile(tile, tile.log(0), contiguous(p.z), vrwkv::kPaddingLogDenominator);
}

template <typename scalar_t>
__device__ void store_outputs(const SharedTile<WkvForwardParams<scalar_t>>& tile, const bool (&is_stored)[kMaxRows]) {
  store_tile(tile, tile.p.y, tile.input(vrwkv::kKeys, 0), is_stored);
  if (tile.p.y_residual) store_tile(tile, tile.p.y_residual, tile.input(vrwkv::kValues, 0), is_stored);
}

template <typename scalar_t>
__device__ void store_outputs(const SharedTile<WkvBackwardParams<scalar_t>>& tile, const bool (&is_stored)[kMaxRows]) {
  store_tile(tile, tile.p.gk, tile.input(vrwkv::kKeys, 0), is_stored);
  store_tile(tile, tile.p.gv, tile.input(vrwkv::kValues, 0), is_stored);
}

template <typename scalar_t>
__device__ void store_sums(const SharedTile<WkvForwardParams<scalar_t>>&) {}

// One warp sums gw over the chunks of the tile, another one gu.
template <typename scalar_t>
__device__ void store_sums(const SharedTile<WkvBackwardParams<scalar_t>>& tile) {
  const int column = threadIdx.x % kColumns;
  if (!tile.has_column(column)) return;
  for (int which = threadIdx.x / kColumns; which < 2; which += tile.rows) {
    auto sum = *tile.sum(0, which, column);
    for (int row = 1; row < tile.rows; ++row) sum += *tile.sum(row, which, column);
    (which == 0 ? tile.p.gw : tile.p.gu)[(tile.b * tile.p.chunks + tile.index) * tile.p.channels + tile.c + column] = sum;
  }
}

// Not inlined, so that the fast path has more registers; `tile` is passed by value, so that the caller's copy stays in
// registers.
template <typename Pass>
__device__ __noinline__ void careful_states(SharedTile<typename Pass::P> tile, int row, int column) {
  vrwkv::careful_states<Pass::kCausal>(tile.p, SharedChunk(tile, row, column));
}
template <typename Pass>
__device__ __noinline__ void careful_outputs(SharedTile<typename Pass::P> tile, int row, int column) {
  vrwkv::careful_outputs<Pass::kCausal>(tile.p, SharedChunk(tile, row, column));
}

// Without `outputs`, writes the own state of each tile to p.states. With it, p.states (if any) holds the states that enter the
// tiles.
template <typename Pass, bool outputs>
__global__ void __launch_bounds__(kMaxRows* kColumns, Occupancy<typename Pass::P>::kBlocks)
    tile_kernel(const __grid_constant__ typename Pass::P p, int rows) {
  using Tile = SharedTile<typename Pass::P>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ bool is_careful[kMaxRows];  // the warps that take the careful path
  const int row = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  const int64_t blocks = p.batch * p.chunks * Tile::column_blocks(p.channels);
  for (int64_t index = blockIdx.x; index < blocks; index += gridDim.x) {
    // Outputs go backwards through the tiles: the tiles that were scanned last are still in the L2 cache.
    const Tile tile(p, rows, memory, outputs ? blocks - 1 - index : index);
    const bool active = tile.has_column(column);
    const auto join = [&](auto number) {
      __syncthreads();
      for (int i = row; active && i < Pass::kDirections; i += rows)
        tile.template join<Pass::template State, decltype(number)>(Pass::kFirstDirection + i, column, !outputs);
      __syncthreads();
    };
    if constexpr (Tile::kFast) {
      if (column == 0) is_careful[row] = false;
      load_inputs(tile, outputs);
      __pipeline_commit();
      __pipeline_wait_prior(0);
      __syncthreads();
      const typename Pass::Fast chunk(tile, row, column);
      if (!chunk.shares_exponent) is_careful[row] = true;
      const bool any_is_careful = __syncthreads_or(!chunk.shares_exponent);
      if (!is_careful[row]) {
        chunk.states();
      } else if (active) {
        careful_states<Pass>(tile, row, column);
      }
      if (any_is_careful) {
        join(0.);
      } else {
        join(0.f);
      }
      if constexpr (outputs) {
        if (!chunk.outputs_share_exponent()) is_careful[row] = true;
        __syncthreads();
        if (!is_careful[row]) {
          chunk.outputs();
        } else if (active) {
          careful_outputs<Pass>(tile, row, column);
        }
        __syncthreads();
        store_outputs(tile, is_careful);
      }
    } else {
      if (active) careful_states<Pass>(tile, row, column);
      join(0.);
      if constexpr (outputs) {
        if (active) careful_outputs<Pass>(tile, row, column);
        __syncthreads();
      }
    }
    if constexpr (outputs) store_sums(tile);
    __syncthreads();  // before the next tile overwrites
  }
}

// A block of threads joins the tiles of 32 channels of one image in one direction; each warp takes a segment.
template <typename Pass>
__global__ void __launch_bounds__(kColumns* vrwkv::kSegments) join_kernel(const __grid_constant__ typename Pass::P p) {
  using SegmentSum = vrwkv::SegmentSum<Pass::template State>;
  using ChunkJoiner = vrwkv::ChunkJoiner<Pass::template State, typename Pass::P>;
  __shared__ __align__(alignof(SegmentSum)) unsigned char memory[sizeof(SegmentSum) * kColumns * vrwkv::kSegments];
  auto* const segments = reinterpret_cast<SegmentSum*>(memory);
  const int column = threadIdx.x % kColumns, segment = threadIdx.x / kColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.y) * kColumns + column;
  for (int64_t i = blockIdx.x; i < p.batch * Pass::kDirections; i += gridDim.x) {
    const int direction = Pass::kFirstDirection + static_cast<int>(i % Pass::kDirections);
    const ChunkJoiner joiner(p, i / Pass::kDirections, c < p.channels ? c : 0, direction, vrwkv::kSegments);
    const double steps = joiner.steps[0];
    if (c < p.channels) joiner.sum_segment(segment, segments + segment * kColumns + column);
    __syncthreads();
    // Each round doubles the number of segments that a sum includes.
    for (int step = 1; step < vrwkv::kSegments; step *= 2) {
      SegmentSum sum = segments[(segment < step ? segment : segment - step) * kColumns + column];
      __syncthreads();
      if (c < p.channels && segment >= step) {
        sum.append(segments[segment * kColumns + column], steps);
        segments[segment * kColumns + column] = sum;
      }
      __syncthreads();
    }
    if (c < p.channels) {
      auto carried = segment == 0 ? SegmentSum().carry : segments[(segment - 1) * kColumns + column].carry;
      joiner.write_entering(segment, &carried);
    }
    __syncthreads();  // before the next image overwrites
  }
}

// Sums the parts of gw and gu, of shape (pieces, C), in double and in a fixed order; blockIdx.y chooses one of the two.
template <typename T>
__global__ void __launch_bounds__(kColumns* kMaxRows)
    sum_kernel(const T* gw, const T* gu, int64_t pieces, int64_t channels, T* gw_sum, T* gu_sum) {
  __shared__ double sums[kMaxRows][kColumns];
  const int row = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  const T* const from = blockIdx.y == 0 ? gw : gu;
  double sum = 0.;
  for (int64_t i = row; c < channels && i < pieces; i += kMaxRows) sum += from[i * channels + c];
  sums[row][column] = sum;
  __syncthreads();
  if (row > 0 || c >= channels) return;
  for (int i = 1; i < kMaxRows; ++i) sum += sums[i][column];
  (blockIdx.y == 0 ? gw_sum : gu_sum)[c] = static_cast<T>(sum);
}

// The rows (warps) of the largest tile that shared memory can hold.
template <typename P>
int largest_rows() {
  const size_t limit = at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin;
  int rows = kMaxRows;
  while (rows > 1 && SharedTile<P>::bytes(rows) + kMaxRows * sizeof(bool) > limit) --rows;
  return rows;
}

template <typename Pass, bool outputs>
void launch_tiles(const typename Pass::P& p, cudaStream_t stream) {
  using Tile = SharedTile<typename Pass::P>;
  const int rows = static_cast<int>(ceil_div(p.chunk_length, kMaxChunk));
  const int bytes = static_cast<int>(Tile::bytes(rows));
  const auto kernel = tile_kernel<Pass, outputs>;
  // Once for each function and device, and for the largest tile: a limit that follows the tile at hand could be lowered by
  // another thread before the launch.
  static std::array<std::once_flag, kMaxDevices> is_set;
  std::call_once(is_set.at(c10::cuda::current_device()), [&] {
    const int most = static_cast<int>(Tile::bytes(largest_rows<typename Pass::P>()));
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  });
  const int64_t blocks = std::min(p.batch * p.chunks * Tile::column_blocks(p.channels), kMaxGridX);
  kernel<<<static_cast<unsigned>(blocks), rows * kColumns, bytes, stream>>>(p, rows);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Runs on the current stream.
template <typename Pass>
void run_pass(const typename Pass::P& p) {
  const int64_t columns = SharedTile<typename Pass::P>::column_blocks(p.channels);
  TORCH_CHECK(columns <= kMaxGridY, "bi_wkv: expected at most ", kMaxGridY * kColumns, " channels on CUDA, got ", p.channels);
  const auto stream = at::cuda::getCurrentCUDAStream();
  if (p.chunks > 1) {
    launch_tiles<Pass, false>(p, stream);
    const auto joins = static_cast<unsigned>(std::min(p.batch * Pass::kDirections, kMaxGridX));
    const dim3 join_grid(joins, static_cast<unsigned>(columns));
    join_kernel<Pass><<<join_grid, kColumns * vrwkv::kSegments, 0, stream>>>(p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  launch_tiles<Pass, true>(p, stream);
}

struct CudaBackend {
  static std::tuple<at::Tensor, at::Tensor> sum_partials(const at::Tensor& gw, const at::Tensor& gu) {
    const int64_t pieces = gw.size(0), channels = gw.size(1);
    const at::Tensor gw_sum = at::empty({channels}, gw.options()), gu_sum = at::empty({channels}, gw.options());
    const dim3 grid(static_cast<unsigned>(ceil_div(channels, kColumns)), 2);
    const auto stream = at::cuda::getCurrentCUDAStream();
    AT_DISPATCH_FLOATING_TYPES(gw.scalar_type(), "bi_wkv_backward", [&] {
      sum_kernel<scalar_t><<<grid, kColumns * kMaxRows, 0, stream>>>(
          gw.const_data_ptr<scalar_t>(), gu.const_data_ptr<scalar_t>(), pieces, channels, gw_sum.mutable_data_ptr<scalar_t>(),
          gu_sum.mutable_data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return {gw_sum, gu_sum};
  }

  // A tile is as long as the sequence if shared memory can hold that.
  template <typename P>
  static int64_t chunk_length(int64_t tokens) {
    int rows = largest_rows<P>();
    if (tokens > rows * kMaxChunk) rows = std::min(rows, Occupancy<P>::kRows);
    return std::min<int64_t>(tokens, rows * kMaxChunk);
  }

  template <typename scalar_t>
  static void run(const WkvForwardParams<scalar_t>& p, bool causal) {
    causal ? run_pass<vrwkv::WkvForwardPass<scalar_t, true>>(p) : run_pass<vrwkv::WkvForwardPass<scalar_t, false>>(p);
  }
  template <typename scalar_t>
  static void run(const WkvBackwardParams<scalar_t>& p, bool causal) {
    causal ? run_pass<vrwkv::WkvBackwardPass<scalar_t, true>>(p) : run_pass<vrwkv::WkvBackwardPass<scalar_t, false>>(p);
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> bi_wkv_forward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                                                              const at::Tensor& v, bool causal, bool save) {
  const c10::cuda::CUDAGuard guard(k.device());
  return vrwkv_ops::bi_wkv_forward<CudaBackend>(w, u, k, v, causal, save);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv_backward(const at::Tensor& gy, const at::Tensor& w,
                                                                           const at::Tensor& u, const at::Tensor& k,
                                                                           const at::Tensor& v, const at::Tensor& y,
                                                                           const at::Tensor& y_residual, const at::Tensor& z,
                                                                           bool causal) {
  const c10::cuda::CUDAGuard guard(k.device());
  return vrwkv_ops::bi_wkv_backward<CudaBackend>(gy, w, u, k, v, y, y_residual, z, causal);
}

}  // namespace vrwkv_cuda
