// bi_wkv6 on CUDA. The state of a head has a row for each key channel and a column for each value channel.
//
// Rows do not depend on each other, nor do columns. scan_kernel computes results for value channels, which are sums over rows: y, and
// the gradient of v, which is y with r and k exchanged and gy in the place of v. A block of threads takes 16 columns.
// gradient_kernel computes the gradients of r, k and w, which are sums over columns; a block takes 16 rows.
//
// Half of the threads of a block go from the first token to the last, and half go back, both in chunks of tokens. Both
// halves visit each chunk, at different times: the first visit leaves its sums in memory, the second one adds its own. All
// sums have a fixed order. All decays are factors of at most one, and nothing is subtracted.
#include <cmath>

#include "../common/cuda_launch.h"
#include "../operators.h"
#include "host.h"

namespace vrwkv_cuda {
namespace {

using vrwkv_ops::acc_type;
using vrwkv_ops::ceil_div;
using vrwkv_ops::kMaxHeadSize;
using vrwkv_ops::View;

constexpr int kSlice = 16;  // columns of a block of scan_kernel, rows of a block of gradient_kernel
constexpr int kKeys = 16;   // rows of a thread of scan_kernel
constexpr int kWidth = 8;   // columns of a thread of gradient_kernel
constexpr int kMaxSize = static_cast<int>(kMaxHeadSize);

// Tokens of a chunk, and of a half for which a thread of gradient_kernel keeps its states in registers.
template <typename T>
constexpr int kTokens = 64 / sizeof(T);
template <typename T>
constexpr int kHeld = kTokens<T> / 2;

// Sequences of (B, T, H N). One direction is forwards or, if is_reversed, backwards.
template <typename scalar_t>
struct Sequences {
  using T = acc_type<scalar_t>;
  int64_t batch, tokens, heads, size;  // size: channels of a head, N
  int directions;
  bool is_reversed;
  View<T> w;
  const T* u;  // contiguous, (H, N)

  __host__ __device__ int64_t slices() const { return ceil_div(size, kSlice); }
  __host__ __device__ int64_t blocks() const { return batch * heads * slices(); }
};

// The slice of 16 channels that a block of threads has, and what a thread does there.
template <typename scalar_t>
struct Place {
  using T = acc_type<scalar_t>;
  const Sequences<scalar_t>& p;
  int side, threads, thread;  // threads of the side, number of this one
  bool is_reversed;
  int64_t image, channel, first;  // the first channel of the head, and of the slice in the head

  __device__ Place(const Sequences<scalar_t>& p, int64_t block) : p(p) {
    threads = blockDim.x / p.directions;
    side = threadIdx.x / threads, thread = threadIdx.x % threads;
    is_reversed = p.is_reversed != (side == 1);
    first = block % p.slices() * kSlice;
    const int64_t head = block / p.slices();
    image = head / p.heads, channel = head % p.heads * p.size;
  }

  // The first token of the chunk that is number n in the order of this side.
  __device__ int64_t begin(int64_t n, int64_t chunks) const { return (is_reversed ? chunks - 1 - n : n) * kTokens<T>; }
  // The place in its chunk of the token that is number i in the order of this side.
  __device__ int token(int i) const { return is_reversed ? kTokens<T> - 1 - i : i; }

  // Reads a chunk of some channels of the head; zeros stand for tokens and channels that do not exist.
  template <int kPitch, typename value_t, typename Function>
  __device__ void load(T (*to)[kPitch], const View<value_t>& from, int64_t begin, int64_t first, int count,
                       const Function& function) const {
    for (int i = thread; i < kTokens<T> * count; i += threads) {
      const int t = i / count, c = i % count;
      const bool exists = begin + t < p.tokens && first + c < p.size;
      to[t][c] = exists ? function(static_cast<T>(*from.row(image, begin + t, channel + first + c)), first + c) : T(0);
    }
  }
  template <int kPitch, typename value_t>
  __device__ void load(T (*to)[kPitch], const View<value_t>& from, int64_t begin, int64_t first, int count) const {
    load(to, from, begin, first, count, [](T x, int64_t) { return x; });
  }
  template <int kPitch>
  __device__ void load_decays(T (*to)[kPitch], int64_t begin, int64_t first, int count) const {
    load(to, p.w, begin, first, count, [](T w, int64_t) { return std::exp(-std::exp(w)); });
  }

  // Adds up what the visits of a token leave. `number` counts the visits of this side, of `visits`.
  template <typename out_t>
  __device__ void leave(T sum, int64_t number, int64_t visits, T* partial, out_t* out, int64_t at) const {
    const bool is_second = 2 * number >= visits;
    if (is_second && p.directions == 2) sum += partial[at];
    if (is_second || p.directions == 1) {
      out[at] = static_cast<out_t>(sum);
    } else {
      partial[at] = sum;
    }
  }
};

// --- Results for value channels ---------------------------------------------------------------

template <typename scalar_t>
struct ScanParams : Sequences<scalar_t> {
  using T = acc_type<scalar_t>;
  View<scalar_t> r, k, v;  // out = r S, and S takes k v
  T* partial;              // as large as out
  scalar_t* out;           // contiguous
};

template <typename T>
struct ScanTile {
  T r[kTokens<T>][kMaxSize], k[kTokens<T>][kMaxSize], d[kTokens<T>][kMaxSize], bonus[kTokens<T>][kMaxSize];
  T v[kTokens<T>][kSlice];
  T sums[kMaxSize / kKeys][kTokens<T>][kSlice];
};

// A thread has kKeys rows of one column.
template <typename scalar_t>
__global__ void __launch_bounds__(2 * kMaxSize / kKeys * kSlice) scan_kernel(const __grid_constant__ ScanParams<scalar_t> p) {
  using T = acc_type<scalar_t>;
  __shared__ ScanTile<T> tiles[2];
  // The number of chunks is even, so that the two sides never visit one chunk at the same time.
  const int64_t chunks = p.directions * ceil_div(p.tokens, p.directions * kTokens<T>);
  for (int64_t block = blockIdx.x; block < p.blocks(); block += gridDim.x) {
    const Place<scalar_t> place(p, block);
    ScanTile<T>& tile = tiles[place.side];
    const int column = place.thread % kSlice, group = place.thread / kSlice, groups = place.threads / kSlice;
    const int rows = groups * kKeys;
    T state[kKeys] = {};
    for (int64_t n = 0; n < chunks; ++n) {
      const int64_t begin = place.begin(n, chunks);
      place.load(tile.r, p.r, begin, 0, rows);
      place.load(tile.k, p.k, begin, 0, rows);
      place.load_decays(tile.d, begin, 0, rows);
      // One side has the weight of the token itself.
      place.load(tile.bonus, p.k, begin, 0, rows,
                 [&](T k, int64_t c) { return place.side == 0 ? p.u[place.channel + c] * k : T(0); });
      place.load(tile.v, p.v, begin, place.first, kSlice);
      __syncthreads();
      for (int i = 0; i < kTokens<T>; ++i) {
        const int t = place.token(i);
        const T v = tile.v[t][column];
        T sum = 0, own = 0;
#pragma unroll
        for (int c = 0; c < kKeys; ++c) {
          const int row = group * kKeys + c;
          sum += tile.r[t][row] * state[c];
          own += tile.r[t][row] * tile.bonus[t][row];
          state[c] = tile.d[t][row] * state[c] + tile.k[t][row] * v;
        }
        tile.sums[group][t][column] = sum + own * v;
      }
      __syncthreads();
      for (int i = place.thread; i < kTokens<T> * kSlice; i += place.threads) {
        const int t = i / kSlice, c = i % kSlice;
        if (begin + t >= p.tokens || place.first + c >= p.size) continue;
        T sum = tile.sums[0][t][c];
        for (int g = 1; g < groups; ++g) sum += tile.sums[g][t][c];
        const int64_t at = (place.image * p.tokens + begin + t) * p.heads * p.size + place.channel + place.first + c;
        place.leave(sum, n, chunks, p.partial, p.out, at);
      }
    }
  }
}

// --- Gradients for key channels ---------------------------------------------------------------

template <typename scalar_t>
struct GradientParams : Sequences<scalar_t> {
  using T = acc_type<scalar_t>;
  View<scalar_t> r, k, v, gy;
  T *partial_r, *partial_k;  // as large as gr and gk
  scalar_t *gr, *gk;         // contiguous
  T* gw;                     // contiguous
  T* gu;                     // (B, H, N)
  T* edges;                  // the states before the chunks: (blocks, directions, chunks, kWidth, threads of a side)
};

template <typename T>
struct GradientTile {
  T v[kTokens<T>][kMaxSize], g[kTokens<T>][kMaxSize];
  T r[kTokens<T>][kSlice], k[kTokens<T>][kSlice], d[kTokens<T>][kSlice];
  T sums[3][kHeld<T>][kMaxSize / kWidth][kSlice];
};

// A thread has kWidth columns of one row. Its side first goes over the sequence and keeps the states before each chunk. Then it
// goes back with the adjoint states and computes the states of each chunk again.
template <typename scalar_t>
__global__ void __launch_bounds__(2 * kMaxSize / kWidth * kSlice)
    gradient_kernel(const __grid_constant__ GradientParams<scalar_t> p) {
  using T = acc_type<scalar_t>;
  __shared__ GradientTile<T> tiles[2];
  __shared__ double gu_sums[kMaxSize / kWidth][kSlice];
  const int64_t chunks = ceil_div(p.tokens, kTokens<T>);
  const int size = static_cast<int>(p.size), groups = size / kWidth;
  for (int64_t block = blockIdx.x; block < p.blocks(); block += gridDim.x) {
    const Place<scalar_t> place(p, block);
    GradientTile<T>& tile = tiles[place.side];
    const int row = place.thread % kSlice, group = place.thread / kSlice, first = group * kWidth;
    const auto update = [&](T(&state)[kWidth], const T* keys, const T* values, T d) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) state[j] = d * state[j] + keys[row] * values[first + j];
    };
    T* const edges = p.edges + (block * p.directions + place.side) * chunks * kWidth * place.threads + place.thread;
    T state[kWidth] = {};
    for (int64_t n = 0; n < chunks; ++n) {
      for (int j = 0; j < kWidth; ++j) edges[(n * kWidth + j) * place.threads] = state[j];
      const int64_t begin = place.begin(n, chunks);
      place.load(tile.k, p.k, begin, place.first, kSlice);
      place.load_decays(tile.d, begin, place.first, kSlice);
      place.load(tile.v, p.v, begin, 0, size);
      __syncthreads();
      for (int i = 0; i < kTokens<T>; ++i) {
        const int t = place.token(i);
        update(state, tile.k[t], tile.v[t], tile.d[t][row]);
      }
      __syncthreads();
    }
    // One side has the weight of the token itself.
    const bool has_bonus = place.side == 0 && place.first + row < size;
    const T u = has_bonus ? p.u[place.channel + place.first + row] : T(0);
    double gu = 0;
    T adjoint[kWidth] = {};
    for (int64_t n = chunks - 1; n >= 0; --n) {
      const int64_t begin = place.begin(n, chunks);
      place.load(tile.r, p.r, begin, place.first, kSlice);
      place.load(tile.k, p.k, begin, place.first, kSlice);
      place.load_decays(tile.d, begin, place.first, kSlice);
      place.load(tile.v, p.v, begin, 0, size);
      place.load(tile.g, p.gy, begin, 0, size);
      __syncthreads();
      T gu_of_chunk = 0;
      for (int half = 1; half >= 0; --half) {
        for (int j = 0; j < kWidth; ++j) state[j] = edges[(n * kWidth + j) * place.threads];
        for (int i = 0; i < half * kHeld<T>; ++i) {
          const int t = place.token(i);
          update(state, tile.k[t], tile.v[t], tile.d[t][row]);
        }
        T states[kHeld<T>][kWidth];
#pragma unroll
        for (int i = 0; i < kHeld<T>; ++i) {
          const int t = place.token(half * kHeld<T> + i);
          for (int j = 0; j < kWidth; ++j) states[i][j] = state[j];
          update(state, tile.k[t], tile.v[t], tile.d[t][row]);
        }
#pragma unroll
        for (int i = kHeld<T> - 1; i >= 0; --i) {
          const int t = place.token(half * kHeld<T> + i);
          const T r = tile.r[t][row], k = tile.k[t][row];
          T gr = 0, gk = 0, gd = 0, vg = 0;
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            const T v = tile.v[t][first + j], g = tile.g[t][first + j];
            gr += states[i][j] * g;
            gk += adjoint[j] * v;
            gd += states[i][j] * adjoint[j];
            vg += v * g;
          }
          if (place.side == 0) {
            gr += vg * u * k;
            gk += vg * u * r;
            gu_of_chunk += vg * r * k;
          }
          tile.sums[0][i][group][row] = gr;
          tile.sums[1][i][group][row] = gk;
          tile.sums[2][i][group][row] = gd;
          update(adjoint, tile.r[t], tile.g[t], tile.d[t][row]);
        }
        __syncthreads();
        for (int i = place.thread; i < kHeld<T> * kSlice; i += place.threads) {
          const int held = i / kSlice, c = i % kSlice;
          const int64_t t = begin + place.token(half * kHeld<T> + held), channel = place.channel + place.first + c;
          if (t >= p.tokens || place.first + c >= p.size) continue;
          T sums[3];
          for (int which = 0; which < 3; ++which) {
            sums[which] = tile.sums[which][held][0][c];
            for (int g = 1; g < groups; ++g) sums[which] += tile.sums[which][held][g][c];
          }
          const int64_t number = 2 * (chunks - 1 - n) + 1 - half, visits = 2 * chunks;
          const int64_t at = (place.image * p.tokens + t) * p.heads * p.size + channel;
          place.leave(sums[0], number, visits, p.partial_r, p.gr, at);
          place.leave(sums[1], number, visits, p.partial_k, p.gk, at);
          // dd/dw = -exp(w - exp(w)), at most 1/e; it is 0 where exp(w) is infinite.
          const T w = *p.w.row(place.image, t, channel), rate = std::exp(w);
          place.leave(-(std::isinf(rate) ? T(0) : std::exp(w - rate)) * sums[2], number, visits, p.gw, p.gw, at);
        }
        __syncthreads();
      }
      gu += gu_of_chunk;
    }
    if (place.side == 0) gu_sums[group][row] = gu;
    __syncthreads();
    if (has_bonus && group == 0) {
      for (int g = 1; g < groups; ++g) gu += gu_sums[g][row];
      p.gu[place.image * p.heads * p.size + place.channel + place.first + row] = static_cast<T>(gu);
    }
    __syncthreads();  // before the next slice overwrites
  }
}

// --- Launches ---------------------------------------------------------------------------------

template <typename P>
void set_sequences(P& p, const at::Tensor& w, const at::Tensor& u, bool causal) {
  p.w = vrwkv_ops::view<typename P::T>(w), p.u = u.const_data_ptr<typename P::T>();
  p.batch = w.size(0), p.tokens = w.size(1), p.heads = u.size(0), p.size = u.size(1);
  p.directions = causal ? 1 : 2, p.is_reversed = false;
}

unsigned grid(int64_t blocks) { return static_cast<unsigned>(std::min(blocks, kMaxBlocks)); }

// Memory for sums of the first visits: the result itself if it has the type of sums, or if there is no second visit.
at::Tensor partial_of(const at::Tensor& result, const at::Tensor& w, bool causal) {
  return causal || result.scalar_type() == w.scalar_type() ? result : at::empty(result.sizes(), w.options());
}

template <typename T>
T* data(const at::Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename scalar_t>
void scan(const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w, const at::Tensor& u,
          const at::Tensor& out, bool causal, bool is_reversed) {
  using vrwkv_ops::view;
  const at::Tensor partial = partial_of(out, w, causal);
  ScanParams<scalar_t> p;
  set_sequences(p, w, u, causal);
  p.is_reversed = is_reversed;
  p.r = view<scalar_t>(r), p.k = view<scalar_t>(k), p.v = view<scalar_t>(v);
  p.partial = data<acc_type<scalar_t>>(partial), p.out = data<scalar_t>(out);
  const auto count = static_cast<unsigned>(p.directions * ceil_div(p.size, kKeys) * kSlice);
  scan_kernel<scalar_t><<<grid(p.blocks()), count, 0, at::cuda::getCurrentCUDAStream()>>>(p);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

at::Tensor bi_wkv6_forward(const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
                           const at::Tensor& u, bool causal) {
  const c10::cuda::CUDAGuard guard(v.device());
  vrwkv_ops::check_wkv6_inputs(r, k, v, w, u);
  const at::Tensor y = at::empty(v.sizes(), v.options()), bonus = u.contiguous();
  if (y.numel() == 0) return y;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "bi_wkv6_forward",
                                  [&] { scan<scalar_t>(r, k, v, w, bonus, y, causal, false); });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> bi_wkv6_backward(
    const at::Tensor& gy, const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
    const at::Tensor& u, bool causal) {
  const c10::cuda::CUDAGuard guard(v.device());
  const vrwkv_ops::Wkv6Gradients grads(gy, r, k, v, w, u);
  if (v.numel() == 0) return grads.sum();
  const at::Tensor bonus = u.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "bi_wkv6_backward", [&] {
    using vrwkv_ops::view;
    using T = acc_type<scalar_t>;
    scan<scalar_t>(k, r, gy, w, bonus, grads.v, causal, causal);
    const at::Tensor partial_r = partial_of(grads.r, w, causal), partial_k = partial_of(grads.k, w, causal);
    GradientParams<scalar_t> p;
    set_sequences(p, w, bonus, causal);
    const int64_t threads = p.size / kWidth * kSlice, chunks = ceil_div(p.tokens, kTokens<T>);
    const at::Tensor edges = at::empty({p.blocks() * p.directions * chunks * kWidth * threads}, w.options());
    p.r = view<scalar_t>(r), p.k = view<scalar_t>(k), p.v = view<scalar_t>(v), p.gy = view<scalar_t>(gy);
    p.partial_r = data<T>(partial_r), p.partial_k = data<T>(partial_k);
    p.gr = data<scalar_t>(grads.r), p.gk = data<scalar_t>(grads.k);
    p.gw = data<T>(grads.w), p.gu = data<T>(grads.u), p.edges = data<T>(edges);
    const auto count = static_cast<unsigned>(p.directions * threads);
    gradient_kernel<scalar_t><<<grid(p.blocks()), count, 0, at::cuda::getCurrentCUDAStream()>>>(p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grads.sum();
}

}  // namespace vrwkv_cuda
