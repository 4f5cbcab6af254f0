// bi_wkv6 on the CPU for one instruction set.
//
// Sequences are cut into chunks of 16 tokens. The tokens of a chunk see each other in pairs, with running products of decays.
// They see the other chunks through states, and all of that is products of small matrices: the state of a head, keys by values,
// with receptances and keys that decay to the edge of their chunk. All decays are factors of at most one, and nothing is
// subtracted.
#include "cpu_kernels.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../common/cpu_isa_begin.h"
#include "../common/scaled.h"
#include "../common/vector.h"

namespace {
namespace vrwkv {

using vrwkv_cpu::kWkv6Columns;
using vrwkv_ops::acc_type;
using vrwkv_ops::ceil_div;
using vrwkv_ops::View;
using vrwkv_ops::Wkv6BackwardParams;
using vrwkv_ops::Wkv6ForwardParams;
using vrwkv_ops::Wkv6Inputs;

constexpr int kColumns = kWkv6Columns;
constexpr int kChunk = 16;  // tokens
constexpr int kMaxSize = vrwkv_ops::kMaxHeadSize;
constexpr int kState = kMaxSize * kMaxSize;
// The backward pass keeps the chunks of a segment and the states before them. In a longer sequence it visits all segments but
// the last twice.
constexpr int64_t kSegment = 64;
constexpr int kPairRegisters = 4, kGradientRegisters = 2;

// Complete unrolling lets the compiler keep rows in registers.
#define VRWKV_UNROLL _Pragma("GCC unroll 16")

// --- A row of a matrix: kWidth neighbouring elements --------------------------------------------

#if defined(VRWKV_CPU_AVX512)
constexpr int kVectorBytes = 64, kTileRows = 8, kWideColumns = 32;
VRWKV_FN __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
VRWKV_FN __m512d fused(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(VRWKV_CPU_AVX2)
constexpr int kVectorBytes = 32, kTileRows = 4, kWideColumns = 16;
VRWKV_FN __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
VRWKV_FN __m256d fused(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#else
constexpr int kVectorBytes = 16, kTileRows = 4, kWideColumns = 16;
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

// Uninitialised elements on the boundary of a vector. glibc's aligned allocations would leave holes and take fresh pages each
// time.
template <typename T>
class Memory {
 public:
  explicit Memory(int64_t count = 1) : bytes_(new char[count * sizeof(T) + kVectorBytes]) {
    const auto address = (reinterpret_cast<uintptr_t>(bytes_.get()) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    data_ = reinterpret_cast<T*>(address);
  }
  T& operator[](int64_t i) const { return data_[i]; }
  T* operator->() const { return data_; }

 private:
  std::unique_ptr<char[]> bytes_;
  T* data_;
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

// Computes to = a b, plus from, times `scale` if that is given. Rows of `to`, `from` and b have kPitch elements. The numbers of
// rows and columns are multiples of kTileRows and kColumns; `scale` has one factor for each row, or for each column.
enum class Scale { kNone, kOfRows, kOfColumns };

template <int kPitch, Scale of, int kWidth, typename T>
VRWKV_FN void multiply_tile(T* to, const T* from, int row, int column, const Factor<T>& a, const T* b, int depth,
                            const T* scale) {
  using R = Row<T, kWidth>;
  R sum[kTileRows];
  VRWKV_UNROLL
  for (int i = 0; i < kTileRows; ++i) sum[i] = R::filled(T(0));
  const T* factor = a.x + row * a.row_step;
  for (int n = 0; n < depth; ++n, factor += a.column_step) {
    const auto b_row = R::load(b + n * kPitch + column);
    VRWKV_UNROLL
    for (int i = 0; i < kTileRows; ++i) sum[i] = sum[i].plus(R::filled(factor[i * a.row_step]), b_row);
  }
  VRWKV_UNROLL
  for (int i = 0; i < kTileRows; ++i) {
    // Added last: it takes one rounding then, not one for each n.
    if (from != nullptr) {
      const auto before = R::load(from + (row + i) * kPitch + column);
      if (of == Scale::kNone) sum[i] = sum[i] + before;
      if (of == Scale::kOfRows) sum[i] = sum[i].plus(before, R::filled(scale[row + i]));
      if (of == Scale::kOfColumns) sum[i] = sum[i].plus(before, R::load(scale + column));
    }
    sum[i].store(to + (row + i) * kPitch + column);
  }
}

template <int kPitch, Scale of = Scale::kNone, typename T>
void multiply(T* to, const std::common_type_t<T>* from, int rows, int columns, const Factor<T>& a, const T* b, int depth,
              const T* scale = nullptr) {
  int column = 0;
  if constexpr (kPitch >= kWideColumns)
    for (; column + kWideColumns <= columns; column += kWideColumns)
      for (int row = 0; row < rows; row += kTileRows)
        multiply_tile<kPitch, of, kWideColumns>(to, from, row, column, a, b, depth, scale);
  for (; column < columns; column += kColumns)
    for (int row = 0; row < rows; row += kTileRows)
      multiply_tile<kPitch, of, kColumns>(to, from, row, column, a, b, depth, scale);
}

template <typename T>
VRWKV_FN void transpose_block(T* to, int to_pitch, const T* from, int from_pitch) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * to_pitch + i] = from[i * from_pitch + j];
}

#if defined(__x86_64__)
VRWKV_FN void transpose_block(float* to, int to_pitch, const float* from, int from_pitch) {
  __m128 row[4];
  for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_ps(from + i * from_pitch);
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_pitch, row[i]);
}
#endif

// The numbers of rows and columns are multiples of 4.
template <int kToPitch, int kFromPitch, typename T>
VRWKV_FN void transpose(T (*to)[kToPitch], const T (*from)[kFromPitch], int rows, int columns) {
  for (int i = 0; i < rows; i += 4)
    for (int j = 0; j < columns; j += 4) transpose_block(to[j] + i, kToPitch, from[i] + j, kFromPitch);
}

// --- A chunk of one head, in the accumulation type and without strides --------------------------

template <typename T>
using Tokens = T[kChunk][kMaxSize];

// Of the tokens of a chunk, and of the whole chunk.
template <typename T>
struct alignas(kVectorBytes) Decays {
  Tokens<T> rate, d;  // exp(w) and exp(-exp(w))
  T whole[kMaxSize];
};

// r, k, v and g are zero beyond the tokens of the sequence and the channels of the head.
template <typename T>
struct alignas(kVectorBytes) Chunk {
  Tokens<T> r, k, v, g;
  Tokens<T> before, after;  // decays of the tokens of the chunk before a token, or after it
  Decays<T>* decays;
  int64_t begin, count;  // tokens
};

// Heads have a multiple of 8 channels: a constant loop becomes one instruction or two.
template <typename To, typename From>
VRWKV_FN void copy_channels(To* __restrict to, const From* __restrict from, int64_t size) {
  for (int64_t c = 0; c < size; c += 8) cast_lanes<8>(to + c, from + c);
}

// Copies the tokens of a chunk, and prefetches those that come `ahead` tokens later. Fills the rest of the chunk with zeros.
template <typename T, typename scalar_t>
VRWKV_FN void read(Tokens<T>& to, const View<scalar_t>& from, int64_t image, const Chunk<T>& chunk, int64_t channel,
                   int64_t size, int64_t tokens, int64_t ahead) {
  const int64_t width = ceil_div(size, kColumns) * kColumns;
  for (int64_t t = 0; t < chunk.count; ++t) {
    const scalar_t* row = from.row(image, chunk.begin + t, channel);
    const int64_t next = chunk.begin + t + ahead;
    if (from.channel_stride == 1) {
      copy_channels(to[t], row, size);
      if (next >= 0 && next < tokens)
        for (int64_t c = 0; c < size; c += 64 / sizeof(scalar_t)) __builtin_prefetch(row + ahead * from.token_stride + c);
    } else {
      for (int64_t c = 0; c < size; ++c) to[t][c] = cast<T>(row[c * from.channel_stride]);
    }
    for (int64_t c = size; c < width; ++c) to[t][c] = T(0);
  }
  for (int64_t t = chunk.count; t < kChunk; ++t) std::fill_n(to[t], width, T(0));
}

// e^x for x up to 87 (double: 700), where it is still finite, and 0 below the negative bound.
template <typename T>
VRWKV_FN T limited_exp(T x) {
  constexpr T kBound = std::is_same_v<T, float> ? 87 : 700;
  const auto e = exp_scaled_unclamped(clamp(x, kBound));
  const T result = e.mantissa * any_power_of_two(e.exponent);
  return x < -kBound ? T(0) : result;
}

// Replaces w by exp(w) in the chunk's rates, and computes the decays of its tokens.
template <typename T>
void set_decays(const Chunk<T>& chunk, int width) {
  auto& decays = *chunk.decays;
  auto& rate = decays.rate;
  const int count = static_cast<int>(chunk.count);
  for (int t = 0; t < count; ++t) {  // two loops: exponentials that follow each other are independent
    for (int column = 0; column < width; column += kColumns)
      for (int j = 0; j < kColumns; ++j) rate[t][column + j] = limited_exp(rate[t][column + j]);
    for (int column = 0; column < width; column += kColumns)
      for (int j = 0; j < kColumns; ++j) decays.d[t][column + j] = limited_exp(-rate[t][column + j]);
  }
  for (int t = count; t < kChunk; ++t) std::fill_n(decays.d[t], width, T(1));
  for (int column = 0; column < width; column += kColumns) {
    auto sum = Columns<T>::filled(T(0));
    for (int t = 0; t < count; ++t) sum = sum + Columns<T>::load(rate[t] + column);
    sum.store(decays.whole + column);
    for (int j = 0; j < kColumns; ++j) decays.whole[column + j] = limited_exp(-decays.whole[column + j]);
  }
}

// Calls use_before(t, column, decay) with the decays of the tokens before token t, and use_after with those after it.
template <typename T, typename UseBefore, typename UseAfter>
VRWKV_FN void for_each_product(const Chunk<T>& chunk, int width, const UseBefore& use_before, const UseAfter& use_after) {
  for (int column = 0; column < width; column += kColumns) {
    auto before = Columns<T>::filled(T(1)), after = before;
    for (int t = 0; t < kChunk; ++t) {
      use_before(t, column, before);
      before = before * Columns<T>::load(chunk.decays->d[t] + column);
    }
    for (int t = kChunk - 1; t >= 0; --t) {
      use_after(t, column, after);
      after = after * Columns<T>::load(chunk.decays->d[t] + column);
    }
  }
}

// Computes the decays before and after each token.
template <typename T>
void set_products(Chunk<T>& chunk, int width) {
  const auto to = [](Tokens<T>& tokens) {
    return [&](int t, int column, const Columns<T>& decay) { decay.store(tokens[t] + column); };
  };
  for_each_product(chunk, width, to(chunk.before), to(chunk.after));
}

// Multiplies r by the decays from the edge where the state enters, and k by those to the other edge, for both directions.
template <bool causal, typename T>
void decay_to_edges(const Chunk<T>& chunk, int width, Tokens<T>& r, Tokens<T>& k, Tokens<T>& r_reverse, Tokens<T>& k_reverse) {
  using C = Columns<T>;
  for_each_product(
      chunk, width,
      [&](int t, int column, const C& before) {
        (C::load(chunk.r[t] + column) * before).store(r[t] + column);
        if constexpr (!causal) (C::load(chunk.k[t] + column) * before).store(k_reverse[t] + column);
      },
      [&](int t, int column, const C& after) {
        (C::load(chunk.k[t] + column) * after).store(k[t] + column);
        if constexpr (!causal) (C::load(chunk.r[t] + column) * after).store(r_reverse[t] + column);
      });
}

template <typename T, typename Params>
VRWKV_FN void set_place(Chunk<T>& chunk, const Params& p, int64_t n) {
  chunk.begin = n * kChunk, chunk.count = std::min<int64_t>(kChunk, p.tokens - chunk.begin);
}

// Reads chunk n of r, k, v and w or gy (those that are given), and prefetches chunk `next`.
template <typename T, typename scalar_t>
void read(Chunk<T>& chunk, const Wkv6Inputs<scalar_t>& p, const View<T>* w, const View<scalar_t>* gy, int64_t image,
          int64_t head, int64_t n, int64_t next) {
  set_place(chunk, p, n);
  const auto read_one = [&](Tokens<T>& to, const auto& from) {
    read(to, from, image, chunk, head * p.size, p.size, p.tokens, (next - n) * kChunk);
  };
  read_one(chunk.r, p.r), read_one(chunk.k, p.k), read_one(chunk.v, p.v);
  if (w != nullptr) read_one(chunk.decays->rate, *w);
  if (gy != nullptr) read_one(chunk.g, *gy);
}

template <typename T>
VRWKV_FN void product(Tokens<T>& to, const Tokens<T>& a, const Tokens<T>& b, int width) {
  for (int t = 0; t < kChunk; ++t)
    for (int c = 0; c < width; c += kColumns) (Columns<T>::load(a[t] + c) * Columns<T>::load(b[t] + c)).store(to[t] + c);
}

// --- Pairs of tokens of one chunk ---------------------------------------------------------------

template <typename T>
struct alignas(kVectorBytes) Gradients {
  Tokens<T> r, k, log_d;           // log_d: of the logarithms of the decays
  Tokens<T> of_later, of_earlier;  // shares of log_d that each token leaves to all tokens before it, and after it
  Tokens<T> of_pairs;              // those of the pairs of each token and a later one of the chunk
  T across[kMaxSize];              // those of pairs of tokens on both sides of the chunk
  T v[kMaxSize][kChunk];           // transposed
};

// Adds what kWidth channels from c on give to the products of token t with the tokens before it, in both roles; the sum of
// a row is a weight. Given the gradients of the weights, adds those of r, k and the decays between the tokens to `sums`.
template <bool causal, bool with_gradients, int kWidth, typename T>
VRWKV_FN void add_pairs(const Chunk<T>& chunk, const T* u, int t, int c, Lanes<T>* earlier, Lanes<T>* later, Lanes<T>& own,
                        const T (*gscores)[kChunk], Gradients<T>* sums) {
  using R = Row<T, kWidth>;
  const Tokens<T>& decays = chunk.decays->d;
  const auto add = [](Lanes<T>& sum, const R& a, const R& b) {
    VRWKV_UNROLL
    for (int i = 0; i < R::kParts; ++i) sum.part[0] = fused(a.part[i], b.part[i], sum.part[0]);
  };
  R r = R::load(chunk.r[t] + c), k = R::load(chunk.k[t] + c), e = R::filled(T(1));  // e: decay from token i to t
  const R bonus = R::load(u + c);
  add(own, r * bonus, k);
  R gr, gk, log_d;
  if constexpr (with_gradients) {
    const R scale = R::filled(gscores[t][t]) * bonus;
    gr = R::load(sums->r[t] + c).plus(scale, k);
    gk = R::load(sums->k[t] + c).plus(scale, r);
    log_d = R::load(sums->log_d[t] + c);
  }
  for (int i = t - 1; i >= 0; --i) {
    const R k_i = R::load(chunk.k[i] + c), d = R::load(decays[i] + c);
    R across;  // shares of log_d of the pairs of token i and a token after t, then of t or after it
    add(earlier[i], r, k_i);
    if constexpr (with_gradients) {
      const R scale = R::filled(gscores[t][i]), scaled = scale * k_i;
      across = R::load(sums->of_pairs[i] + c);
      log_d = log_d + across;
      gr = gr.plus(e, scaled);
      across = across.plus(r, scaled);
      R::load(sums->k[i] + c).plus(scale, r).store(sums->k[i] + c);
    }
    r = r * d;
    if constexpr (!causal) {
      const R r_i = R::load(chunk.r[i] + c);
      add(later[i], k, r_i);
      if constexpr (with_gradients) {
        const R scale = R::filled(gscores[i][t]), scaled = scale * r_i;
        gk = gk.plus(e, scaled);
        across = across.plus(k, scaled);
        R::load(sums->r[i] + c).plus(scale, k).store(sums->r[i] + c);
      }
      k = k * d;
    }
    if constexpr (with_gradients) {
      across.store(sums->of_pairs[i] + c);
      e = e * d;
    }
  }
  if constexpr (with_gradients) {
    gr.store(sums->r[t] + c);
    gk.store(sums->k[t] + c);
    log_d.store(sums->log_d[t] + c);
  }
}

// Computes the weights of the values of a chunk in its results: scores[t][i] = sum r_t E k_i, with the bonus u for t = i. Given
// their gradients, adds those of r, k and the decays between the tokens to `sums`.
template <bool causal, bool with_gradients, typename T>
void find_scores(const Chunk<T>& chunk, const T* u, int width, T (*scores)[kChunk], const T (*gscores)[kChunk],
                 Gradients<T>* sums) {
  // Several registers at once, so that each sum is read and written less often.
  constexpr int kLanes = Lanes<T>::kLanes, kWide = kLanes * (with_gradients ? kGradientRegisters : kPairRegisters);
  if constexpr (with_gradients) std::fill_n(sums->of_pairs[0], kChunk * kMaxSize, T(0));
  for (int t = kChunk - 1; t >= 0; --t) {
    Lanes<T> earlier[kChunk], later[kChunk], own[4];
    for (auto& x : earlier) x = Lanes<T>::filled(T(0));
    for (auto& x : later) x = Lanes<T>::filled(T(0));
    for (auto& x : own) x = Lanes<T>::filled(T(0));
    int c = 0;
    for (; c + kWide <= width; c += kWide)
      add_pairs<causal, with_gradients, kWide>(chunk, u, t, c, earlier, later, own[0], gscores, sums);
    for (; c < width; c += kLanes)
      add_pairs<causal, with_gradients, kLanes>(chunk, u, t, c, earlier, later, own[0], gscores, sums);
    T of_earlier[kChunk], of_later[kChunk], of_own[4];
    sum_rows(of_earlier, earlier, t);
    sum_rows(of_later, later, t);  // zero for a causal operator
    sum_rows(of_own, own, 1);
    scores[t][t] = of_own[0];
    for (int i = 0; i < t; ++i) scores[t][i] = of_earlier[i], scores[i][t] = of_later[i];
  }
}

// --- The operator -------------------------------------------------------------------------------

template <typename T>
std::vector<T> padded_bonus(const T* u, int64_t head, int64_t size) {
  std::vector<T> padded(kMaxSize);
  std::copy_n(u + head * size, size, padded.data());
  return padded;
}

// Copies tokens to a result, and prefetches its place for the chunk before.
template <typename T, typename scalar_t>
VRWKV_FN void write(scalar_t* to, int64_t channels, const T* from, int64_t count, int64_t size) {
  for (int64_t t = 0; t < count; ++t) {
    scalar_t* const row = to + t * channels;
    copy_channels(row, from + t * kMaxSize, size);
    for (int64_t c = 0; c < size; c += 64 / sizeof(scalar_t)) __builtin_prefetch(row + c - kChunk * channels, 1);
  }
}

template <bool causal, typename scalar_t>
void forward(const Wkv6ForwardParams<scalar_t>& p, int64_t image, int64_t head, int64_t first, int64_t last) {
  using T = acc_type<scalar_t>;
  const int64_t chunks = ceil_div(p.tokens, kChunk), channels = p.heads * p.size, shown = std::min(last, p.size) - first;
  const int width = ceil_div(p.size, kColumns) * kColumns, columns = last - first;
  struct alignas(kVectorBytes) Work {
    Chunk<T> chunk;
    Decays<T> decays;
    Tokens<T> r, k;
    T state[kState], scores[kChunk][kChunk];
  };
  struct alignas(kVectorBytes) Kept {  // of a chunk, for the way back
    Tokens<T> y, r, k;
    T whole[kMaxSize];
  };
  const Memory<Work> work;
  const Memory<Kept> all_kept(causal ? 1 : chunks);
  Chunk<T>& chunk = work->chunk;
  chunk.decays = &work->decays;
  T* const state = work->state;
  const auto u = padded_bonus(p.u, head, p.size);
  // r decays from the edge of the chunk where the state enters, and k to the other edge.
  const auto visit = [&](const Tokens<T>& r, const Tokens<T>& k, const T* whole, T* y, bool is_last) {
    multiply<kMaxSize>(y, y, kChunk, columns, rows_of(r), state, width);
    multiply<kMaxSize, Scale::kOfRows>(state, state, width, columns, transposed(k), chunk.v[0] + first, kChunk, whole);
    if (is_last)
      write(p.y + (image * p.tokens + chunk.begin) * channels + head * p.size + first, channels, y, chunk.count, shown);
  };
  std::fill_n(state, kState, T(0));
  for (int64_t n = 0; n < chunks; ++n) {
    Kept& kept = all_kept[causal ? 0 : n];
    read<T, scalar_t>(chunk, p, &p.w, nullptr, image, head, n, n + 1);
    set_decays(chunk, width);
    find_scores<causal, false, T>(chunk, u.data(), width, work->scores, nullptr, nullptr);
    multiply<kMaxSize>(kept.y[0], nullptr, kChunk, columns, {work->scores[0], kChunk, 1}, chunk.v[0] + first, kChunk);
    decay_to_edges<causal>(chunk, width, work->r, work->k, kept.r, kept.k);
    visit(work->r, work->k, work->decays.whole, kept.y[0], causal);
    if constexpr (!causal) std::copy_n(work->decays.whole, width, kept.whole);
  }
  if (causal) return;
  std::fill_n(state, kState, T(0));
  for (int64_t n = chunks - 1; n >= 0; --n) {
    Kept& kept = all_kept[n];
    set_place(chunk, p, n);
    read(chunk.v, p.v, image, chunk, head * p.size, p.size, p.tokens, -kChunk);
    visit(kept.r, kept.k, kept.whole, kept.y[0], true);
  }
}

template <typename scalar_t>
void wkv6_forward(const Wkv6ForwardParams<scalar_t>& p, int64_t image, int64_t head, int64_t first, int64_t last) {
  p.causal ? forward<true>(p, image, head, first, last) : forward<false>(p, image, head, first, last);
}

// Adds the gradients of a chunk that come through the states of one direction: `s` of values by keys before the chunk in this
// direction, `a` of output gradients by receptances after it. The direction that is not reversed comes first.
template <bool reverse, typename T>
void add_states(const Chunk<T>& chunk, int width, const T* s, const T* a, Tokens<T>& part, T (*turned)[kChunk],
                Gradients<T>& sums) {
  const auto& of_r = reverse ? chunk.after : chunk.before;
  const auto& of_k = reverse ? chunk.before : chunk.after;
  const auto add = [&](const Tokens<T>& g, const T* state, const Tokens<T>& decay, const Tokens<T>& x, Tokens<T>& sum,
                       Tokens<T>& left) {
    multiply<kMaxSize>(part[0], nullptr, kChunk, width, rows_of(g), state, width);
    for (int t = 0; t < kChunk; ++t)
      for (int c = 0; c < width; c += kColumns) {
        const auto scaled = Columns<T>::load(part[t] + c) * Columns<T>::load(decay[t] + c);
        const auto share = Columns<T>::load(x[t] + c) * scaled;
        (reverse ? Columns<T>::load(sum[t] + c) + scaled : scaled).store(sum[t] + c);
        (reverse ? Columns<T>::load(left[t] + c) + share : share).store(left[t] + c);
      }
  };
  add(chunk.g, s, of_r, chunk.r, sums.r, reverse ? sums.of_earlier : sums.of_later);
  add(chunk.v, a, of_k, chunk.k, sums.k, reverse ? sums.of_later : sums.of_earlier);
  product(part, chunk.k, of_k, width);
  transpose(turned, part, kChunk, width);
  multiply<kChunk>(sums.v[0], reverse ? sums.v[0] : nullptr, width, kChunk, {a, kMaxSize, 1}, turned[0], width);
  // Pairs of tokens on both sides of the chunk.
  for (int c = 0; c < width; c += kColumns) {
    auto sum = Columns<T>::filled(T(0));
    for (int j = 0; j < width; ++j)
      sum = sum.plus(Columns<T>::load(s + j * kMaxSize + c), Columns<T>::load(a + j * kMaxSize + c));
    sum = sum * Columns<T>::load(chunk.decays->whole + c);
    (reverse ? Columns<T>::load(sums.across + c) + sum : sum).store(sums.across + c);
  }
}

// Memory of the backward pass of a head.
template <bool causal, typename T>
struct alignas(kVectorBytes) Backward {
  static constexpr int kStates =
      causal ? 1 : 2;  // values by keys and, for the other direction, output gradients by receptances
  struct alignas(kVectorBytes) States {
    T of[kStates][kState];
  };

  T s_after[kState], a_after[kState];
  Gradients<T> sums;
  Tokens<T> part;
  T turned[kMaxSize][kChunk], scores[kChunk][kChunk], gscores[kChunk][kChunk];
  double gu[kMaxSize];

  // Moves a state of values by keys over a chunk.
  void move(T* to, const T* from, const Chunk<T>& chunk, const Tokens<T>& values, const Tokens<T>& keys, const Tokens<T>& decay,
            int width) {
    product(part, keys, decay, width);
    multiply<kMaxSize, Scale::kOfColumns>(to, from, width, width, transposed(values), part[0], kChunk, chunk.decays->whole);
  }
  void move(States& to, const States& from, const Chunk<T>& chunk, int width) {
    move(to.of[0], from.of[0], chunk, chunk.v, chunk.k, chunk.after, width);
    if constexpr (!causal) move(to.of[1], from.of[1], chunk, chunk.g, chunk.r, chunk.after, width);
  }

  // Computes the gradients of a chunk, in sums, and moves the states after it to before it.
  void find_gradients(const Chunk<T>& chunk, const States& before, const T* u, int width) {
    transpose(turned, chunk.v, kChunk, width);
    multiply<kChunk>(gscores[0], nullptr, kChunk, kChunk, rows_of(chunk.g), turned[0], width);
    add_states<false>(chunk, width, before.of[0], a_after, part, turned, sums);
    if constexpr (!causal) add_states<true>(chunk, width, s_after, before.of[1], part, turned, sums);
    for (int c = 0; c < width; c += kColumns) {
      auto earlier = Columns<T>::load(sums.across + c), later = Columns<T>::filled(T(0));
      for (int t = 0; t < kChunk; ++t) {
        earlier.store(sums.log_d[t] + c);
        earlier = earlier + Columns<T>::load(sums.of_earlier[t] + c);
      }
      for (int t = kChunk - 1; t >= 0; --t) {
        (Columns<T>::load(sums.log_d[t] + c) + later).store(sums.log_d[t] + c);
        later = later + Columns<T>::load(sums.of_later[t] + c);
      }
    }
    find_scores<causal, true>(chunk, u, width, scores, gscores, &sums);
    multiply<kChunk>(sums.v[0], sums.v[0], width, kChunk, transposed(chunk.g), scores[0], kChunk);
    move(a_after, a_after, chunk, chunk.g, chunk.r, chunk.before, width);
    if constexpr (!causal) move(s_after, s_after, chunk, chunk.v, chunk.k, chunk.before, width);
  }
};

template <bool causal, typename scalar_t>
void backward(const Wkv6BackwardParams<scalar_t>& p, int64_t image, int64_t head) {
  using T = acc_type<scalar_t>;
  using Work = Backward<causal, T>;
  const int64_t chunks = ceil_div(p.tokens, kChunk), step = std::min(chunks, kSegment);
  const int64_t segments = ceil_div(chunks, step), size = p.size, channels = p.heads * size;
  const int width = ceil_div(size, kColumns) * kColumns;
  const Memory<Work> work;
  const Memory<Chunk<T>> kept(step);
  const Memory<typename Work::States> states(step);  // after each kept chunk
  const Memory<Decays<T>> decays(chunks);
  const Memory<typename Work::States> edges(segments);  // before each segment
  std::memset(&edges[0], 0, sizeof(edges[0]));
  std::fill_n(work->s_after, kState, T(0));
  std::fill_n(work->a_after, kState, T(0));
  std::fill_n(work->gu, kMaxSize, 0.);
  const auto u = padded_bonus(p.u, head, size);
  const auto read_chunk = [&](Chunk<T>& chunk, int64_t n, int64_t next, bool is_first) {
    chunk.decays = &decays[n];
    read<T, scalar_t>(chunk, p, is_first ? &p.w : nullptr, &p.gy, image, head, n, next);
    if (is_first) set_decays(chunk, width);
    set_products(chunk, width);
  };
  const int64_t last_segment = (segments - 1) * step;
  for (int64_t n = 0; n < last_segment; ++n) {
    read_chunk(kept[0], n, n + 1, true);
    const auto& from = n % step == 0 ? edges[n / step] : states[0];
    auto& to = (n + 1) % step == 0 ? edges[(n + 1) / step] : states[0];
    work->move(to, from, kept[0], width);
  }
  for (int64_t first = last_segment; first >= 0; first -= step) {
    const int64_t last = std::min(first + step, chunks) - 1;
    const auto before = [&](int64_t n) -> const auto& { return n == first ? edges[first / step] : states[n - first - 1]; };
    for (int64_t n = first; n <= last; ++n) {
      read_chunk(kept[n - first], n, n < last ? n + 1 : first - step, first == last_segment);
      if (n < last) work->move(states[n - first], before(n), kept[n - first], width);
    }
    for (int64_t n = last; n >= first; --n) {
      const Chunk<T>& chunk = kept[n - first];
      Gradients<T>& sums = work->sums;
      work->find_gradients(chunk, before(n), u.data(), width);
      const int64_t at = (image * p.tokens + chunk.begin) * channels + head * size;
      write(p.gr + at, channels, sums.r[0], chunk.count, size);
      write(p.gk + at, channels, sums.k[0], chunk.count, size);
      transpose(work->part, sums.v, width, kChunk);
      write(p.gv + at, channels, work->part[0], chunk.count, size);
      for (int c = 0; c < width; c += kColumns) {
        auto gu = Columns<T>::filled(T(0));
        for (int t = 0; t < chunk.count; ++t) {
          const auto rate = Columns<T>::filled(T(-1)) * Columns<T>::load(chunk.decays->rate[t] + c);
          (rate * Columns<T>::load(sums.log_d[t] + c)).store(sums.log_d[t] + c);
          const auto rk = Columns<T>::load(chunk.r[t] + c) * Columns<T>::load(chunk.k[t] + c);
          gu = gu.plus(Columns<T>::filled(work->gscores[t][t]), rk);
        }
        T lanes[kColumns];
        gu.store(lanes);
        for (int j = 0; j < kColumns; ++j) work->gu[c + j] += lanes[j];
      }
      write(p.gw + at, channels, sums.log_d[0], chunk.count, size);
    }
  }
  for (int64_t c = 0; c < size; ++c) p.gu[image * channels + head * size + c] = static_cast<T>(work->gu[c]);
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
