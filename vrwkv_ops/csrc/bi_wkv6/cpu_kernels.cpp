// bi_wkv6 on the CPU for one instruction set.
//
// Sequences are cut into chunks of 16 tokens. The tokens of a chunk see each other in pairs, with running products of decays.
// They see the other chunks through states, and all of that is products of small matrices: the state of a head, keys by values,
// with receptances and keys that decay to the edge of their chunk. All decays are factors of at most one, and nothing is
// subtracted.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <memory>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/cpu_isa_begin.h"
#include "../common/scaled.h"
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
constexpr int kChunk = 16;  // tokens
constexpr int kMaxSize = vrwkv_ops::kMaxHeadSize;
constexpr int kState = kMaxSize * kMaxSize;

// Complete unrolling lets the compiler keep rows in registers.
#define VRWKV_UNROLL _Pragma("GCC unroll 16")

// --- A row of a matrix: kWidth neighbouring elements --------------------------------------------

#if defined(VRWKV_CPU_AVX512)
constexpr int kVectorBytes = 64, kTileRows = 8;
VRWKV_FN __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
VRWKV_FN __m512d fused(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(VRWKV_CPU_AVX2)
constexpr int kVectorBytes = 32, kTileRows = 4;
VRWKV_FN __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
VRWKV_FN __m256d fused(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#else
constexpr int kVectorBytes = 16, kTileRows = 4;
template <typename V>
VRWKV_FN V fused(V a, V b, V c) {
  return a * b + c;
}
#endif

template <typename T, int kWidth>
struct Row {
  typedef T Part __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = sizeof(Part) / sizeof(T);
  static constexpr int kParts = kWidth / kLanes;
  Part part[kParts];

  VRWKV_FN static Row load(const T* from) {
    Row row;
    VRWKV_UNROLL
    for (int i = 0; i < kParts; ++i) std::memcpy(&row.part[i], from + i * kLanes, sizeof(Part));
    return row;
  }
  VRWKV_FN static Row filled(T value) {
    Row row;
    VRWKV_UNROLL
    for (int i = 0; i < kParts; ++i) row.part[i] = value - Part{};
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
  // Returns this + a b.
  VRWKV_FN Row plus(const Row& a, const Row& b) const {
    Row row;
    VRWKV_UNROLL
    for (int i = 0; i < kParts; ++i) row.part[i] = fused(a.part[i], b.part[i], part[i]);
    return row;
  }
};

template <typename T>
using Lanes = Row<T, kVectorBytes / sizeof(T)>;  // one register
template <typename T>
using Columns = Row<T, kColumns>;

// Writes the sum of each row. The number of rows is rounded up to a multiple of 4.
template <typename T>
VRWKV_FN void sum_rows(T* to, const Lanes<T>* rows, int count) {
  for (int i = 0; i < (count + 3) / 4 * 4; ++i) {
    T lanes[Lanes<T>::kLanes];
    rows[i].store(lanes);
    for (int width = Lanes<T>::kLanes / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    to[i] = lanes[0];
  }
}

#if defined(VRWKV_CPU_AVX2) || defined(VRWKV_CPU_AVX512)
VRWKV_FN __m256 narrow(const Lanes<float>& row) {
#if defined(VRWKV_CPU_AVX512)
  return _mm256_add_ps(_mm512_castps512_ps256(row.part[0]), _mm512_extractf32x8_ps(row.part[0], 1));
#else
  return row.part[0];
#endif
}

template <>
VRWKV_FN void sum_rows(float* to, const Lanes<float>* rows, int count) {
  for (int i = 0; i < count; i += 4) {
    const __m256 pair = _mm256_hadd_ps(narrow(rows[i]), narrow(rows[i + 1]));
    const __m256 next = _mm256_hadd_ps(narrow(rows[i + 2]), narrow(rows[i + 3]));
    const __m256 four = _mm256_hadd_ps(pair, next);
    _mm_storeu_ps(to + i, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
  }
}
#endif

// --- Products of matrices -----------------------------------------------------------------------

// A matrix whose elements (i, n) are x[i * row_step + n * column_step].
template <typename T>
struct Factor {
  const T* x;
  int row_step, column_step;
};

template <typename T>
VRWKV_FN Factor<T> rows_of(const T (*x)[kMaxSize]) {
  return {x[0], kMaxSize, 1};
}
template <typename T>
VRWKV_FN Factor<T> transposed(const T (*x)[kMaxSize]) {
  return {x[0], 1, kMaxSize};
}

// Computes to = a b, plus scale from if `from` is given. Rows of `to`, `from` and b have kPitch elements. The numbers of rows and
// columns are multiples of kTileRows and kColumns; `scale` has one factor for each row, or for each column.
enum class Scale { kOfRows, kOfColumns };

template <int kPitch, Scale of, typename T>
void multiply(T* to, const T* from, const T* scale, int rows, int columns, const Factor<T>& a, const T* b, int depth) {
  for (int column = 0; column < columns; column += kColumns)
    for (int row = 0; row < rows; row += kTileRows) {
      Columns<T> sum[kTileRows];
      VRWKV_UNROLL
      for (int i = 0; i < kTileRows; ++i) sum[i] = Columns<T>::filled(T(0));
      const T* factor = a.x + row * a.row_step;
      for (int n = 0; n < depth; ++n, factor += a.column_step) {
        const auto b_row = Columns<T>::load(b + n * kPitch + column);
        VRWKV_UNROLL
        for (int i = 0; i < kTileRows; ++i) sum[i] = sum[i].plus(Columns<T>::filled(factor[i * a.row_step]), b_row);
      }
      VRWKV_UNROLL
      for (int i = 0; i < kTileRows; ++i) {
        // Added last: it takes one rounding then, not one for each n.
        if (from != nullptr) {
          const auto row_of_from = Columns<T>::load(from + (row + i) * kPitch + column);
          if (scale == nullptr) {
            sum[i] = sum[i] + row_of_from;
          } else {
            sum[i] = sum[i].plus(row_of_from,
                                 of == Scale::kOfRows ? Columns<T>::filled(scale[row + i]) : Columns<T>::load(scale + column));
          }
        }
        sum[i].store(to + (row + i) * kPitch + column);
      }
    }
}

// --- A chunk of one head, in the accumulation type and without strides --------------------------

template <typename T>
using Tokens = T[kChunk][kMaxSize];

// r, k, v and g are zero beyond the tokens of the sequence and the channels of the head.
template <typename T>
struct Chunk {
  Tokens<T> r, k, v, g;
  Tokens<T> rate, d;        // exp(w), and the decay of a token
  Tokens<T> before, after;  // of the tokens of the chunk before a token, or after it
  T whole[kMaxSize];        // of all tokens of the chunk
  int64_t begin, count;     // tokens
};

// Copies tokens, and prefetches the chunk that comes `ahead` tokens later.
template <typename T, typename scalar_t>
VRWKV_FN void read(Tokens<T>& to, const View<scalar_t>& from, int64_t image, const Chunk<T>& chunk, int64_t channel,
                   int64_t size, int64_t tokens, int64_t ahead) {
  for (int64_t t = 0; t < chunk.count; ++t) {
    const scalar_t* row = from.row(image, chunk.begin + t, channel);
    if (from.channel_stride == 1) {
      for (int64_t c = 0; c < size; ++c) to[t][c] = static_cast<T>(row[c]);
      const int64_t next = chunk.begin + t + ahead;
      if (next < 0 || next >= tokens) continue;
      for (int64_t c = 0; c < size; c += 64 / sizeof(scalar_t)) __builtin_prefetch(row + ahead * from.token_stride + c);
    } else {
      for (int64_t c = 0; c < size; ++c) to[t][c] = static_cast<T>(row[c * from.channel_stride]);
    }
  }
  for (int64_t t = chunk.count; t < kChunk; ++t) std::fill_n(to[t], size, T(0));
}

// e^x for x up to 87 (double: 700), where it is still finite, and 0 below the negative bound.
template <typename T>
VRWKV_FN T limited_exp(T x) {
  constexpr T kBound = std::is_same_v<T, float> ? 87 : 700;
  const auto e = exp_scaled_unclamped(clamp(x, kBound));
  const T result = e.mantissa * any_power_of_two(e.exponent);
  return x < -kBound ? T(0) : result;
}

// Replaces w by exp(w) in chunk.rate, and computes the decays.
template <typename T>
void set_decays(Chunk<T>& chunk, int width) {
  for (int t = 0; t < chunk.count; ++t) {  // two loops: exponentials that follow each other are independent
    for (int column = 0; column < width; column += kColumns)
      for (int j = 0; j < kColumns; ++j) chunk.rate[t][column + j] = limited_exp(chunk.rate[t][column + j]);
    for (int column = 0; column < width; column += kColumns)
      for (int j = 0; j < kColumns; ++j) chunk.d[t][column + j] = limited_exp(-chunk.rate[t][column + j]);
  }
  for (int t = static_cast<int>(chunk.count); t < kChunk; ++t) std::fill_n(chunk.d[t], width, T(1));
  for (int column = 0; column < width; column += kColumns) {
    auto product = Columns<T>::filled(T(1)), sum = Columns<T>::filled(T(0));
    for (int t = 0; t < kChunk; ++t) {
      product.store(chunk.before[t] + column);
      product = product * Columns<T>::load(chunk.d[t] + column);
      sum = sum + Columns<T>::load(chunk.rate[t] + column);
    }
    sum.store(chunk.whole + column);
    for (int j = 0; j < kColumns; ++j) chunk.whole[column + j] = limited_exp(-chunk.whole[column + j]);
    product = Columns<T>::filled(T(1));
    for (int t = kChunk - 1; t >= 0; --t) {
      product.store(chunk.after[t] + column);
      product = product * Columns<T>::load(chunk.d[t] + column);
    }
  }
}

// Reads chunk n; the next one is n + step.
template <typename T, typename scalar_t>
void read(Chunk<T>& chunk, const Wkv6Inputs<scalar_t>& p, const View<scalar_t>* gy, int64_t image, int64_t head, int64_t n,
          int64_t step, int width) {
  chunk.begin = n * kChunk, chunk.count = std::min<int64_t>(kChunk, p.tokens - chunk.begin);
  const auto read_one = [&](Tokens<T>& to, const auto& from) {
    read(to, from, image, chunk, head * p.size, p.size, p.tokens, step * kChunk);
  };
  read_one(chunk.r, p.r), read_one(chunk.k, p.k), read_one(chunk.v, p.v), read_one(chunk.rate, p.w);
  if (gy != nullptr) read_one(chunk.g, *gy);
  set_decays(chunk, width);
}

template <typename T>
VRWKV_FN void product(Tokens<T>& to, const Tokens<T>& a, const Tokens<T>& b, int width) {
  for (int t = 0; t < kChunk; ++t)
    for (int c = 0; c < width; c += kColumns) (Columns<T>::load(a[t] + c) * Columns<T>::load(b[t] + c)).store(to[t] + c);
}

// --- Pairs of tokens of one chunk ---------------------------------------------------------------

// The weights of the values of a chunk in its results: scores[t][i] = sum r_t E k_i, with the bonus u for t = i.
template <bool causal, typename T>
void find_scores(const Chunk<T>& chunk, const T* u, int width, T (*scores)[kChunk]) {
  using R = Lanes<T>;
  for (int t = 0; t < kChunk; ++t) {
    R earlier[kChunk], later[kChunk], own[4];  // products of token t with tokens before it, in both roles
    for (R& x : earlier) x = R::filled(T(0));
    for (R& x : later) x = R::filled(T(0));
    for (R& x : own) x = R::filled(T(0));
    for (int c = 0; c < width; c += R::kLanes) {
      R r = R::load(chunk.r[t] + c), k = R::load(chunk.k[t] + c);
      own[0] = own[0].plus(r * R::load(u + c), k);
      for (int i = t - 1; i >= 0; --i) {
        const R d = R::load(chunk.d[i] + c);
        earlier[i] = earlier[i].plus(r, R::load(chunk.k[i] + c));
        r = r * d;
        if (causal) continue;
        later[i] = later[i].plus(k, R::load(chunk.r[i] + c));
        k = k * d;
      }
    }
    T sums[kChunk];
    sum_rows(sums, own, 1);
    const T weight = sums[0];
    sum_rows(scores[t], earlier, t);
    scores[t][t] = weight;
    for (int i = t + 1; i < kChunk; ++i) scores[t][i] = T(0);
    if (causal) continue;
    sum_rows(sums, later, t);
    for (int i = 0; i < t; ++i) scores[i][t] = sums[i];
  }
}

template <typename T>
struct Gradients {
  Tokens<T> r, k, log_d;
  Tokens<T> of_later, of_earlier;  // shares of log_d that each token leaves to all tokens before it, and after it
  T v[kMaxSize][kChunk];           // transposed
};

// Adds the gradients of r, k and of the logarithms of the decays between the tokens. gscores are the gradients of the scores,
// which are computed too.
template <bool causal, typename T>
void add_pairs(const Chunk<T>& chunk, const T* u, int width, const T (*gscores)[kChunk], Gradients<T>& sums) {
  using R = Lanes<T>;
  for (int t = 0; t < kChunk; ++t) {
    for (int c = 0; c < width; c += R::kLanes) {
      const R r_t = R::load(chunk.r[t] + c), k_t = R::load(chunk.k[t] + c);
      const R own = R::filled(gscores[t][t]) * R::load(u + c);
      R gr = R::load(sums.r[t] + c).plus(own, k_t), gk = R::load(sums.k[t] + c).plus(own, r_t);
      R e = R::filled(T(1)), r = r_t, k = k_t;  // the decay from token i to t, and r_t and k_t with it
      R pairs[kChunk];
      for (int i = t - 1; i >= 0; --i) {
        const R of_k = R::filled(gscores[t][i]), k_i = of_k * R::load(chunk.k[i] + c);
        gr = gr.plus(e, k_i);
        pairs[i] = r * k_i;
        R::load(sums.k[i] + c).plus(of_k, r).store(sums.k[i] + c);
        const R d = R::load(chunk.d[i] + c);
        if (!causal) {
          const R of_r = R::filled(gscores[i][t]), r_i = of_r * R::load(chunk.r[i] + c);
          gk = gk.plus(e, r_i);
          pairs[i] = pairs[i].plus(k, r_i);
          R::load(sums.r[i] + c).plus(of_r, k).store(sums.r[i] + c);
          k = k * d;
        }
        r = r * d;
        e = e * d;
      }
      gr.store(sums.r[t] + c);
      gk.store(sums.k[t] + c);
      R passing = R::filled(T(0));  // pairs of token t and a token before token i
      for (int i = 1; i < t; ++i) {
        passing = passing + pairs[i - 1];
        (R::load(sums.log_d[i] + c) + passing).store(sums.log_d[i] + c);
      }
    }
  }
}

// --- The operator -------------------------------------------------------------------------------

template <typename T>
std::vector<T> padded_bonus(const T* u, int64_t head, int64_t size) {
  std::vector<T> padded(kMaxSize);
  std::copy_n(u + head * size, size, padded.data());
  return padded;
}

template <typename T, typename scalar_t>
VRWKV_FN void write(scalar_t* to, int64_t channels, const T* from, int64_t count, int64_t size) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t c = 0; c < size; ++c) to[t * channels + c] = static_cast<scalar_t>(from[t * kMaxSize + c]);
}

template <bool causal, typename scalar_t>
void forward(const Wkv6ForwardParams<scalar_t>& p, int64_t image, int64_t head, int64_t first, int64_t last) {
  using T = acc_type<scalar_t>;
  const int64_t chunks = (p.tokens + kChunk - 1) / kChunk, channels = p.heads * p.size, kept = std::min(last, p.size) - first;
  const int width = (p.size + kColumns - 1) / kColumns * kColumns, columns = last - first;
  constexpr int kTile = kChunk * kMaxSize;
  struct Work {
    Chunk<T> chunk;
    Tokens<T> scaled;
    T state[kState], scores[kChunk][kChunk];
  };
  const auto work = std::make_unique<Work>();
  const std::unique_ptr<T[]> results(new T[(causal ? 1 : chunks) * kTile]);
  Chunk<T>& chunk = work->chunk;
  Tokens<T>& scaled = work->scaled;
  T* const state = work->state;
  const auto u = padded_bonus(p.u, head, p.size);
  const auto visit = [&](const Tokens<T>& of_r, const Tokens<T>& of_k, T* y, bool is_last) {
    product(scaled, chunk.r, of_r, width);
    multiply<kMaxSize, Scale::kOfRows, T>(y, y, nullptr, kChunk, columns, rows_of<T>(scaled), state, width);
    product(scaled, chunk.k, of_k, width);
    multiply<kMaxSize, Scale::kOfRows, T>(state, state, chunk.whole, width, columns, transposed<T>(scaled), chunk.v[0] + first,
                                          kChunk);
    if (is_last)
      write(p.y + (image * p.tokens + chunk.begin) * channels + head * p.size + first, channels, y, chunk.count, kept);
  };
  for (int64_t n = 0; n < chunks; ++n) {
    read<T, scalar_t>(chunk, p, nullptr, image, head, n, 1, width);
    find_scores<causal>(chunk, u.data(), width, work->scores);
    T* const y = results.get() + (causal ? 0 : n * kTile);
    multiply<kMaxSize, Scale::kOfRows, T>(y, nullptr, nullptr, kChunk, columns, {work->scores[0], kChunk, 1},
                                          chunk.v[0] + first, kChunk);
    visit(chunk.before, chunk.after, y, causal);
  }
  if (causal) return;
  std::fill_n(state, kState, T(0));
  for (int64_t n = chunks - 1; n >= 0; --n) {
    read<T, scalar_t>(chunk, p, nullptr, image, head, n, -1, width);
    visit(chunk.after, chunk.before, results.get() + n * kTile, true);
  }
}

template <typename scalar_t>
void wkv6_forward(const Wkv6ForwardParams<scalar_t>& p, int64_t image, int64_t head, int64_t first, int64_t last) {
  p.causal ? forward<true>(p, image, head, first, last) : forward<false>(p, image, head, first, last);
}

// Adds what a chunk gets through the states of one direction: `s` of values by keys before the chunk in this direction, `a`, of
// output gradients by receptances, after it.
template <bool reverse, typename T>
void add_states(const Chunk<T>& chunk, int width, const T* s, const T* a, Tokens<T>& part, T (*turned)[kChunk],
                Gradients<T>& sums) {
  const auto& of_r = reverse ? chunk.after : chunk.before;
  const auto& of_k = reverse ? chunk.before : chunk.after;
  const auto add = [&](const Tokens<T>& g, const T* state, const Tokens<T>& decay, const Tokens<T>& x, Tokens<T>& sum,
                       Tokens<T>& left) {
    multiply<kMaxSize, Scale::kOfRows, T>(part[0], nullptr, nullptr, kChunk, width, rows_of<T>(g), state, width);
    for (int t = 0; t < kChunk; ++t)
      for (int c = 0; c < width; c += kColumns) {
        const auto scaled = Columns<T>::load(part[t] + c) * Columns<T>::load(decay[t] + c);
        (Columns<T>::load(sum[t] + c) + scaled).store(sum[t] + c);
        Columns<T>::load(left[t] + c).plus(Columns<T>::load(x[t] + c), scaled).store(left[t] + c);
      }
  };
  add(chunk.g, s, of_r, chunk.r, sums.r, reverse ? sums.of_earlier : sums.of_later);
  add(chunk.v, a, of_k, chunk.k, sums.k, reverse ? sums.of_later : sums.of_earlier);
  product(part, chunk.k, of_k, width);
  for (int t = 0; t < kChunk; ++t)
    for (int c = 0; c < width; ++c) turned[c][t] = part[t][c];
  multiply<kChunk, Scale::kOfRows, T>(sums.v[0], sums.v[0], nullptr, width, kChunk, {a, kMaxSize, 1}, turned[0], width);
  // Pairs of tokens on both sides of the chunk.
  for (int c = 0; c < width; c += kColumns) {
    auto sum = Columns<T>::filled(T(0));
    for (int j = 0; j < width; ++j)
      sum = sum.plus(Columns<T>::load(s + j * kMaxSize + c), Columns<T>::load(a + j * kMaxSize + c));
    sum = sum * Columns<T>::load(chunk.whole + c);
    for (int t = 0; t < kChunk; ++t) (Columns<T>::load(sums.log_d[t] + c) + sum).store(sums.log_d[t] + c);
  }
}

template <bool causal, typename scalar_t>
void backward(const Wkv6BackwardParams<scalar_t>& p, int64_t image, int64_t head) {
  using T = acc_type<scalar_t>;
  const int64_t chunks = (p.tokens + kChunk - 1) / kChunk, size = p.size, channels = p.heads * size;
  const int width = (size + kColumns - 1) / kColumns * kColumns;
  constexpr int kStates = causal ? 1 : 2;
  struct Work {
    Chunk<T> chunk;
    Gradients<T> sums;
    Tokens<T> part;
    T turned[kMaxSize][kChunk], scores[kChunk][kChunk], gscores[kChunk][kChunk];
    T s_after[kState], a_after[kState];
    double gu[kMaxSize];
  };
  const auto storage = std::make_unique<Work>();
  Work& work = *storage;
  Chunk<T>& chunk = work.chunk;
  Gradients<T>& sums = work.sums;
  // States before each chunk: values by keys and, for the other direction, output gradients by receptances.
  const std::unique_ptr<T[]> edges(new T[chunks * kStates * kState]);
  std::fill_n(edges.get(), kStates * kState, T(0));
  const auto u = padded_bonus(p.u, head, size);
  // Moves a state of values by keys over the chunk.
  const auto move = [&](T* to, const T* from, const Tokens<T>& values, const Tokens<T>& keys, const Tokens<T>& decay) {
    product(work.part, keys, decay, width);
    multiply<kMaxSize, Scale::kOfColumns, T>(to, from, chunk.whole, width, width, transposed<T>(values), work.part[0], kChunk);
  };
  for (int64_t n = 0; n + 1 < chunks; ++n) {
    read<T, scalar_t>(chunk, p, causal ? nullptr : &p.gy, image, head, n, 1, width);
    const T* const before = edges.get() + n * kStates * kState;
    T* const after = edges.get() + (n + 1) * kStates * kState;
    move(after, before, chunk.v, chunk.k, chunk.after);
    if (!causal) move(after + kState, before + kState, chunk.g, chunk.r, chunk.after);
  }
  for (int64_t n = chunks - 1; n >= 0; --n) {
    read<T, scalar_t>(chunk, p, &p.gy, image, head, n, -1, width);
    std::memset(&sums, 0, sizeof(sums));
    // Scores, their gradients, and the gradients of the values.
    find_scores<causal>(chunk, u.data(), width, work.scores);
    for (int t = 0; t < kChunk; ++t)
      for (int c = 0; c < width; ++c) work.turned[c][t] = chunk.v[t][c];
    multiply<kChunk, Scale::kOfRows, T>(work.gscores[0], nullptr, nullptr, kChunk, kChunk, rows_of<T>(chunk.g), work.turned[0],
                                        width);
    multiply<kChunk, Scale::kOfRows, T>(sums.v[0], nullptr, nullptr, width, kChunk, transposed<T>(chunk.g), work.scores[0],
                                        kChunk);
    const T* const before = edges.get() + n * kStates * kState;
    add_states<false>(chunk, width, before, work.a_after, work.part, work.turned, sums);
    if (!causal) add_states<true>(chunk, width, work.s_after, before + kState, work.part, work.turned, sums);
    for (int c = 0; c < width; c += kColumns) {
      auto earlier = Columns<T>::filled(T(0)), later = earlier;
      for (int t = 0; t < kChunk; ++t) {
        (Columns<T>::load(sums.log_d[t] + c) + earlier).store(sums.log_d[t] + c);
        earlier = earlier + Columns<T>::load(sums.of_earlier[t] + c);
      }
      for (int t = kChunk - 1; t >= 0; --t) {
        (Columns<T>::load(sums.log_d[t] + c) + later).store(sums.log_d[t] + c);
        later = later + Columns<T>::load(sums.of_later[t] + c);
      }
    }
    add_pairs<causal>(chunk, u.data(), width, work.gscores, sums);
    move(work.a_after, work.a_after, chunk.g, chunk.r, chunk.before);
    if (!causal) move(work.s_after, work.s_after, chunk.v, chunk.k, chunk.before);

    const int64_t at = (image * p.tokens + chunk.begin) * channels + head * size;
    write(p.gr + at, channels, sums.r[0], chunk.count, size);
    write(p.gk + at, channels, sums.k[0], chunk.count, size);
    T gu[kMaxSize] = {};
    for (int t = 0; t < chunk.count; ++t) {
      const int64_t row = at + t * channels;
      for (int64_t c = 0; c < size; ++c) {
        p.gv[row + c] = static_cast<scalar_t>(sums.v[c][t]);
        p.gw[row + c] = -chunk.rate[t][c] * sums.log_d[t][c];
        gu[c] += work.gscores[t][t] * chunk.r[t][c] * chunk.k[t][c];
      }
    }
    for (int64_t c = 0; c < size; ++c) work.gu[c] += gu[c];
  }
  for (int64_t c = 0; c < size; ++c) p.gu[image * channels + head * size + c] = static_cast<T>(work.gu[c]);
}

template <typename scalar_t>
void wkv6_backward(const Wkv6BackwardParams<scalar_t>& p, int64_t image, int64_t head) {
  p.causal ? backward<true>(p, image, head) : backward<false>(p, image, head);
}

template <typename scalar_t>
constexpr vrwkv_cpu::Wkv6Kernels<scalar_t> make_table() {
  return {wkv6_forward<scalar_t>, wkv6_backward<scalar_t>};
}

}  // namespace vrwkv
}  // namespace

VRWKV_DEFINE_CPU_KERNELS(vrwkv_cpu::Wkv6Kernels)

#include "../common/cpu_isa_end.h"
