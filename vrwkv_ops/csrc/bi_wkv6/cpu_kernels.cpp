// bi_wkv6 on the CPU for one instruction set.
//
// The state of a head, N keys by N values, is cut into tiles that stay in registers for a chunk of tokens. A tile is read for
// the outputs of a token, then decays and takes the token. All decays are factors of at most one, and nothing is subtracted.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/cpu_isa_begin.h"
#include "cpu_kernels.h"

namespace {
namespace vrwkv {

using vrwkv_cpu::kWkv6Columns;
using vrwkv_ops::acc_type;
using vrwkv_ops::View;
using vrwkv_ops::Wkv6BackwardParams;
using vrwkv_ops::Wkv6ForwardParams;
using vrwkv_ops::Wkv6Inputs;

constexpr int kColumns = kWkv6Columns;
constexpr int kChunk = 32;  // tokens for which a tile stays in registers
constexpr int kMaxSize = vrwkv_ops::kMaxHeadSize;
#if defined(VRWKV_CPU_AVX512)
constexpr int kKeys = 8;  // keys of a tile
#else
constexpr int kKeys = 4;
#endif

// Complete unrolling lets the compiler keep a tile in registers.
#define VRWKV_UNROLL _Pragma("GCC unroll 16")

// --- A row of a tile: kColumns neighbouring columns ---------------------------------------------

#if defined(VRWKV_CPU_AVX512)
constexpr int kVectorBytes = 64;
VRWKV_FN __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
VRWKV_FN __m512d fused(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(VRWKV_CPU_AVX2)
constexpr int kVectorBytes = 32;
VRWKV_FN __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
VRWKV_FN __m256d fused(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#else
constexpr int kVectorBytes = 16;
template <typename V>
VRWKV_FN V fused(V a, V b, V c) {
  return a * b + c;
}
#endif

template <typename T>
struct Row {
  typedef T Part __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = sizeof(Part) / sizeof(T);
  static constexpr int kParts = kColumns / kLanes;
  Part part[kParts];

  VRWKV_FN static Row load(const T* from) {
    Row row;
    VRWKV_UNROLL
    for (int i = 0; i < kParts; ++i) std::memcpy(&row.part[i], from + i * kLanes, sizeof(Part));
    return row;
  }
  VRWKV_FN void store(T* to) const {
    VRWKV_UNROLL
    for (int i = 0; i < kParts; ++i) std::memcpy(to + i * kLanes, &part[i], sizeof(Part));
  }
  VRWKV_FN Row operator+(const Row& other) const {
    Row row;
    VRWKV_UNROLL
    for (int i = 0; i < kParts; ++i) row.part[i] = part[i] + other.part[i];
    return row;
  }
  VRWKV_FN Row operator*(const Row& other) const {
    Row row;
    VRWKV_UNROLL
    for (int i = 0; i < kParts; ++i) row.part[i] = part[i] * other.part[i];
    return row;
  }
  VRWKV_FN Row operator*(T factor) const {
    Row row;
    VRWKV_UNROLL
    for (int i = 0; i < kParts; ++i) row.part[i] = part[i] * factor;
    return row;
  }
  // Returns this + a b.
  VRWKV_FN Row plus(const Row& a, const Row& b) const {
    Row row;
    VRWKV_UNROLL
    for (int i = 0; i < kParts; ++i) row.part[i] = fused(a.part[i], b.part[i], part[i]);
    return row;
  }
  VRWKV_FN Row plus(T factor, const Row& b) const {
    Row row;
    VRWKV_UNROLL
    for (int i = 0; i < kParts; ++i) row.part[i] = fused(factor - Part{}, b.part[i], part[i]);
    return row;
  }
  VRWKV_FN T sum() const {
    Part total = part[0];
    for (int i = 1; i < kParts; ++i) total = total + part[i];
    T lanes[kLanes];
    std::memcpy(lanes, &total, sizeof(lanes));
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
  }
};

// Adds the sum of each row to `to`.
template <typename T>
VRWKV_FN void add_sums(T* to, const Row<T> (&rows)[kKeys]) {
  VRWKV_UNROLL
  for (int c = 0; c < kKeys; ++c) to[c] += rows[c].sum();
}

#if defined(VRWKV_CPU_AVX2) || defined(VRWKV_CPU_AVX512)
VRWKV_FN __m256 narrow(const Row<float>& row) {
#if defined(VRWKV_CPU_AVX512)
  return _mm256_add_ps(_mm512_castps512_ps256(row.part[0]), _mm512_extractf32x8_ps(row.part[0], 1));
#else
  return row.part[0] + row.part[1];
#endif
}

template <>
VRWKV_FN void add_sums(float* to, const Row<float> (&rows)[kKeys]) {
  for (int c = 0; c < kKeys; c += 4) {
    const __m256 pair = _mm256_hadd_ps(narrow(rows[c]), narrow(rows[c + 1]));
    const __m256 next = _mm256_hadd_ps(narrow(rows[c + 2]), narrow(rows[c + 3]));
    const __m256 four = _mm256_hadd_ps(pair, next);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
    _mm_storeu_ps(to + c, _mm_add_ps(_mm_loadu_ps(to + c), sums));
  }
}
#endif

// --- A chunk of one head, in the accumulation type and without strides ----------------------------

template <typename T>
struct Chunk {
  T r[kChunk][kMaxSize], k[kChunk][kMaxSize], d[kChunk][kMaxSize];
  T v[kChunk][kMaxSize], g[kChunk][kMaxSize];
  int64_t begin, count;  // tokens
};

template <typename T, typename scalar_t>
VRWKV_FN void read(T (*to)[kMaxSize], const View<scalar_t>& from, const int64_t image, int64_t begin, int64_t count,
                   int64_t channel, int64_t size) {
  for (int64_t t = 0; t < count; ++t) {
    const scalar_t* row = from.row(image, begin + t, channel);
    if (from.channel_stride == 1) {
      for (int64_t c = 0; c < size; ++c) to[t][c] = static_cast<T>(row[c]);
    } else {
      for (int64_t c = 0; c < size; ++c) to[t][c] = static_cast<T>(row[c * from.channel_stride]);
    }
  }
}

template <typename T, typename scalar_t>
void read(Chunk<T>& chunk, const Wkv6Inputs<scalar_t>& p, int64_t image, int64_t head, int64_t begin) {
  const int64_t channel = head * p.size, channels = p.heads * p.size;
  chunk.begin = begin;
  chunk.count = std::min<int64_t>(kChunk, p.tokens - begin);
  read(chunk.r, p.r, image, begin, chunk.count, channel, p.size);
  read(chunk.k, p.k, image, begin, chunk.count, channel, p.size);
  read(chunk.v, p.v, image, begin, chunk.count, channel, p.size);
  const View<T> d{p.d, p.tokens * channels, channels, 1};
  read(chunk.d, d, image, begin, chunk.count, channel, p.size);
}

template <typename T>
struct Tile {
  Row<T> row[kKeys];

  VRWKV_FN void load(const T* state) {
    VRWKV_UNROLL
    for (int c = 0; c < kKeys; ++c) row[c] = Row<T>::load(state + c * kMaxSize);
  }
  VRWKV_FN void store(T* state) const {
    VRWKV_UNROLL
    for (int c = 0; c < kKeys; ++c) row[c].store(state + c * kMaxSize);
  }
  // Decays and takes a token: keys k, values v.
  VRWKV_FN void update(const T* d, const T* k, const Row<T>& v) {
    VRWKV_UNROLL
    for (int c = 0; c < kKeys; ++c) row[c] = (row[c] * d[c]).plus(k[c], v);
  }
};

// Adds r S to the outputs of a chunk, in the order of the tokens or the reverse order, for one tile.
template <bool reverse, typename T>
VRWKV_FN void read_tile(const Chunk<T>& chunk, int64_t key, int64_t column, T* state, T* y, int64_t width, int64_t first) {
  Tile<T> tile;
  tile.load(state + key * kMaxSize + column);
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int64_t t = reverse ? chunk.count - 1 - i : i;
    T* out = y + t * width + column - first;
    Row<T> sum = Row<T>::load(out);
    VRWKV_UNROLL
    for (int c = 0; c < kKeys; ++c) sum = sum.plus(chunk.r[t][key + c], tile.row[c]);
    sum.store(out);
    tile.update(&chunk.d[t][key], &chunk.k[t][key], Row<T>::load(&chunk.v[t][column]));
  }
  tile.store(state + key * kMaxSize + column);
}

template <typename scalar_t>
void wkv6_forward(const Wkv6ForwardParams<scalar_t>& p, int64_t image, int64_t head, int64_t first, int64_t last) {
  using T = acc_type<scalar_t>;
  const int64_t width = last - first, chunks = (p.tokens + kChunk - 1) / kChunk;
  std::vector<T> buffer(p.tokens * width + kMaxSize * kMaxSize);
  T *y = buffer.data(), *state = y + p.tokens * width;
  std::vector<Chunk<T>> storage(1);  // zero beyond the channels of the head
  Chunk<T>& chunk = storage[0];
  const T* u = p.u + head * p.size;
  for (int64_t n = 0; n < chunks; ++n) {
    read(chunk, p, image, head, n * kChunk);
    T* out = y + chunk.begin * width;
    for (int64_t t = 0; t < chunk.count; ++t) {
      T own = 0;  // the token's own weight
      for (int64_t c = 0; c < p.size; ++c) own += chunk.r[t][c] * u[c] * chunk.k[t][c];
      for (int64_t j = 0; j < width; ++j) out[t * width + j] = own * chunk.v[t][first + j];
    }
    for (int64_t column = first; column < last; column += kColumns)
      for (int64_t key = 0; key < p.size; key += kKeys) read_tile<false>(chunk, key, column, state, out, width, first);
  }
  if (!p.causal) {
    std::fill_n(state, kMaxSize * kMaxSize, T(0));
    for (int64_t n = chunks - 1; n >= 0; --n) {
      read(chunk, p, image, head, n * kChunk);
      T* out = y + chunk.begin * width;
      for (int64_t column = first; column < last; column += kColumns)
        for (int64_t key = 0; key < p.size; key += kKeys) read_tile<true>(chunk, key, column, state, out, width, first);
    }
  }
  const int64_t channels = p.heads * p.size, kept = std::min(last, p.size) - first;
  for (int64_t t = 0; t < p.tokens; ++t) {
    scalar_t* to = p.y + (image * p.tokens + t) * channels + head * p.size + first;
    for (int64_t j = 0; j < kept; ++j) to[j] = static_cast<scalar_t>(y[t * width + j]);
  }
}

// Sums over a chunk of tokens, see the formulas in docs/operator.md.
template <typename T>
struct Gradients {
  T r[kChunk][kMaxSize], k[kChunk][kMaxSize], d[kChunk][kMaxSize], v[kChunk][kMaxSize];
};

// One tile of a chunk. The states before the chunk are of keys and values (s) and of receptances and output gradients (a);
// those after it arrive in s_after and a_after.
template <bool causal, typename T>
VRWKV_FN void backward_tile(const Chunk<T>& chunk, int64_t key, int64_t column, const T* s_before, const T* a_before,
                            T* s_after, T* a_after, Gradients<T>& sums) {
  const int64_t at = key * kMaxSize + column;
  Tile<T> s_at[kChunk], a_at[kChunk], s, a;
  s.load(s_before + at);
  if (!causal) a.load(a_before + at);
  for (int64_t t = 0; t < chunk.count; ++t) {
    const auto v = Row<T>::load(&chunk.v[t][column]);
    s_at[t] = s;
    s.update(&chunk.d[t][key], &chunk.k[t][key], v);
    if (causal) continue;
    a_at[t] = a;
    a.update(&chunk.d[t][key], &chunk.r[t][key], Row<T>::load(&chunk.g[t][column]));
  }
  a.load(a_after + at);
  if (!causal) s.load(s_after + at);
  for (int64_t t = chunk.count - 1; t >= 0; --t) {
    const auto v = Row<T>::load(&chunk.v[t][column]), g = Row<T>::load(&chunk.g[t][column]);
    Row<T> gr[kKeys], gk[kKeys], gd[kKeys];
    Row<T> gv = Row<T>::load(&sums.v[t][column]);
    VRWKV_UNROLL
    for (int c = 0; c < kKeys; ++c) {
      const auto& before = s_at[t].row[c];
      gd[c] = before * a.row[c];
      if (causal) {
        gr[c] = before * g;
        gk[c] = a.row[c] * v;
        gv = gv.plus(chunk.k[t][key + c], a.row[c]);
      } else {
        const auto& a_row = a_at[t].row[c];
        gd[c] = gd[c].plus(s.row[c], a_row);
        const auto both = a.row[c] + a_row;
        gr[c] = (before + s.row[c]) * g;
        gk[c] = both * v;
        gv = gv.plus(chunk.k[t][key + c], both);
      }
    }
    gv.store(&sums.v[t][column]);
    add_sums(&sums.r[t][key], gr);
    add_sums(&sums.k[t][key], gk);
    add_sums(&sums.d[t][key], gd);
    a.update(&chunk.d[t][key], &chunk.r[t][key], g);
    if (!causal) s.update(&chunk.d[t][key], &chunk.k[t][key], v);
  }
  a.store(a_after + at);
  if (!causal) s.store(s_after + at);
}

// Moves a state over a chunk.
template <typename T>
VRWKV_FN void move_state(const Chunk<T>& chunk, const T (*keys)[kMaxSize], const T (*values)[kMaxSize], int64_t size,
                         int64_t width, T* state) {
  for (int64_t column = 0; column < width; column += kColumns)
    for (int64_t key = 0; key < size; key += kKeys) {
      Tile<T> tile;
      tile.load(state + key * kMaxSize + column);
      for (int64_t t = 0; t < chunk.count; ++t) tile.update(&chunk.d[t][key], &keys[t][key], Row<T>::load(&values[t][column]));
      tile.store(state + key * kMaxSize + column);
    }
}

template <typename scalar_t>
void wkv6_backward(const Wkv6BackwardParams<scalar_t>& p, int64_t image, int64_t head) {
  using T = acc_type<scalar_t>;
  constexpr int64_t kState = kMaxSize * kMaxSize;
  const int64_t chunks = (p.tokens + kChunk - 1) / kChunk, size = p.size, channels = p.heads * size;
  const int64_t width = (size + kColumns - 1) / kColumns * kColumns;
  std::vector<T> edges((chunks + 1) * 2 * kState);  // before each chunk; the last ones arrive from behind
  std::vector<Chunk<T>> storage(1);
  std::vector<Gradients<T>> sums_storage(1);
  Chunk<T>& chunk = storage[0];
  Gradients<T>& sums = sums_storage[0];
  const auto read_chunk = [&](int64_t n) {
    read(chunk, p, image, head, n * kChunk);
    read(chunk.g, p.gy, image, chunk.begin, chunk.count, head * size, size);
  };
  for (int64_t n = 0; n + 1 < chunks; ++n) {
    read_chunk(n);
    T* next = &edges[(n + 1) * 2 * kState];
    std::copy_n(next - 2 * kState, 2 * kState, next);
    move_state(chunk, chunk.k, chunk.v, size, width, next);
    if (!p.causal) move_state(chunk, chunk.r, chunk.g, size, width, next + kState);
  }
  T* after = &edges[chunks * 2 * kState];
  const T* u = p.u + head * size;
  std::vector<double> gu(size);
  for (int64_t n = chunks - 1; n >= 0; --n) {
    read_chunk(n);
    const T* before = &edges[n * 2 * kState];
    sums = Gradients<T>();
    for (int64_t column = 0; column < width; column += kColumns)
      for (int64_t key = 0; key < size; key += kKeys) {
        if (p.causal) {
          backward_tile<true>(chunk, key, column, before, before + kState, after, after + kState, sums);
        } else {
          backward_tile<false>(chunk, key, column, before, before + kState, after, after + kState, sums);
        }
      }
    for (int64_t t = 0; t < chunk.count; ++t) {
      T vg = 0, own = 0;
      for (int64_t c = 0; c < size; ++c) {
        vg += chunk.v[t][c] * chunk.g[t][c];
        own += chunk.r[t][c] * u[c] * chunk.k[t][c];
      }
      const int64_t at = (image * p.tokens + chunk.begin + t) * channels + head * size;
      for (int64_t c = 0; c < size; ++c) {
        const T r = chunk.r[t][c], k = chunk.k[t][c];
        p.gr[at + c] = static_cast<scalar_t>(sums.r[t][c] + vg * u[c] * k);
        p.gk[at + c] = static_cast<scalar_t>(sums.k[t][c] + vg * u[c] * r);
        p.gv[at + c] = static_cast<scalar_t>(sums.v[t][c] + own * chunk.g[t][c]);
        p.gd[at + c] = sums.d[t][c];
        gu[c] += double(vg) * double(r) * double(k);
      }
    }
  }
  for (int64_t c = 0; c < size; ++c) p.gu[image * channels + head * size + c] = static_cast<T>(gu[c]);
}

template <typename scalar_t>
constexpr vrwkv_cpu::Wkv6Kernels<scalar_t> make_table() {
  return {wkv6_forward<scalar_t>, wkv6_backward<scalar_t>};
}

}  // namespace vrwkv
}  // namespace

VRWKV_DEFINE_CPU_KERNELS(vrwkv_cpu::Wkv6Kernels)

#include "../common/cpu_isa_end.h"
