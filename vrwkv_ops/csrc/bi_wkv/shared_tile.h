// Bi-WKV over neighbouring channels and a tile of tokens in shared memory: the work of a block of CUDA threads, written as
// steps of one thread, so that a test can run it on the CPU. A thread takes a chunk of kMaxChunk tokens of one channel.
//
// On the fast path all weights of a chunk share one exponent, and states follow the plain recurrences, which are too short here
// to accumulate rounding errors: a token takes an exponential and a few multiply-adds for each state. If the weights of a chunk
// are too far apart for one exponent (`shares_exponent`), its warp takes the careful path, the code of chunk.h on global
// memory.
#pragma once

#include "chunk.h"

#if defined(__CUDACC__)
#define VRWKV_UNROLL _Pragma("unroll")
#else
#define VRWKV_UNROLL
#endif

namespace {
namespace vrwkv {

constexpr int kColumns = 32;  // channels of a tile, one for each lane of a warp
static_assert(kWidth == 1, "a thread has one channel");

// e^x 2^n for an integral n, if that is at most 2^127; 0 below 2^-126. The rounding of log2(e) changes the ratio of two weights
// that are e^d apart by a factor of 1 + 1e-8 d.
VRWKV_FN float exp_shifted(float x, float n) {
  const float power = multiply_add(x, kLog2eFloat, n);
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(power));
  return y;
#else
  return ::exp2f(power);
#endif
}

// a / b for a normal b that is far from the largest float.
VRWKV_FN float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
#else
  return a / b;
#endif
}

// The largest distance in bits between weights that share an exponent.
constexpr float kMaxSpread = 64.f;

template <typename P>
struct SharedTileLayout;

// The inputs of a tile, in this order.
enum TileInput { kKeys, kValues, kGrads, kOutputs, kResiduals };

// The key and log denominator of padding tokens past the end of the sequence, in its last chunk; all else is 0. Their weights
// are 0, and no state that they change is used.
template <typename scalar_t>
VRWKV_FN scalar_t padding_key() {
  return static_cast<scalar_t>(sizeof(scalar_t) == 2 && !std::is_same_v<scalar_t, c10::BFloat16> ? -65504.f : -3e38f);
}
constexpr float kPaddingLogDenominator = 3e38f;

template <typename scalar_t>
struct SharedTileLayout<WkvForwardParams<scalar_t>> {
  static constexpr int kInputs = 2;
  static constexpr bool kHasLogs = false;
  static constexpr int kStateFields = WkvState<float>::kFields;
};

template <typename scalar_t>
struct SharedTileLayout<WkvBackwardParams<scalar_t>> {
  static constexpr int kInputs = sizeof(scalar_t) == 2 ? 5 : 4;
  static constexpr bool kHasLogs = true;  // z
  static constexpr int kStateFields = GradState<float>::kFields;
};

// A tile is a chunk of the problem. It has `rows` chunks of its own, one for each warp.
template <typename P>
struct SharedTile {
  using scalar_t = typename P::scalar_type;
  using T = typename P::acc_t;
  using Layout = SharedTileLayout<P>;
  // Double has the careful path only, which reads global memory.
  static constexpr bool kFast = std::is_same_v<T, float>;

  const P& p;
  int rows;
  scalar_t* inputs;
  T *logs, *states, *sums;
  int64_t b, index, c, first;
  int tokens;

  // `flat` counts images, then tiles, then blocks of channels. `memory` has bytes(rows) bytes and is aligned to 16.
  VRWKV_FN SharedTile(const P& problem, int row_count, void* memory, int64_t flat) : p(problem), rows(row_count) {
    const int64_t columns = column_blocks(p.channels), count = rows * kMaxChunk * kColumns;
    inputs = static_cast<scalar_t*>(memory);
    logs = reinterpret_cast<T*>(inputs + (kFast ? Layout::kInputs * count : 0));
    states = logs + (kFast && Layout::kHasLogs ? count : 0);
    sums = states + rows * kColumns * 2 * Layout::kStateFields;
    b = flat / columns / p.chunks, index = flat / columns % p.chunks, c = flat % columns * kColumns;
    first = index * p.chunk_length;
    tokens = static_cast<int>(p.tokens - first < p.chunk_length ? p.tokens - first : p.chunk_length);
  }

  static VRWKV_FN int64_t column_blocks(int64_t channels) { return vrwkv_ops::ceil_div(channels, kColumns); }
  static VRWKV_FN size_t bytes(int rows) {
    const size_t tokens = kFast ? kMaxChunk : 0;
    const size_t token = Layout::kInputs * sizeof(scalar_t) + (Layout::kHasLogs ? sizeof(T) : 0);
    return rows * kColumns * (tokens * token + (2 * Layout::kStateFields + (Layout::kHasLogs ? 2 : 0)) * sizeof(T));
  }

  VRWKV_FN scalar_t* input(int which, int t) const { return inputs + (which * rows * kMaxChunk + t) * kColumns; }
  VRWKV_FN T* log(int t) const { return logs + t * kColumns; }
  VRWKV_FN int64_t offset(int t) const { return (b * p.tokens + first + t) * p.channels + c; }
  VRWKV_FN bool has_column(int column) const { return c + column < p.channels; }
  // Returns the tokens of a row's chunk.
  VRWKV_FN int length(int row) const {
    const int left = tokens - row * kMaxChunk;
    return left < 0 ? 0 : (left < kMaxChunk ? left : kMaxChunk);
  }
  VRWKV_FN T* sum(int row, int which, int column) const { return sums + (row * 2 + which) * kColumns + column; }

  // e^(w n) for the careful path.
  VRWKV_FN Decay<T> decay(int n, int column) const { return Decay<T>::of(p.w[c + column], n); }

  template <typename State>
  VRWKV_FN State read_state(int row, int direction, int column) const {
    State s;
    s.for_each_field([&](T& x, int i) { x = *state(row, direction, i, column); });
    return s;
  }
  template <typename State>
  VRWKV_FN void write_state(State s, int row, int direction, int column) const {
    s.for_each_field([&](T& x, int i) { *state(row, direction, i, column) = x; });
  }

  // Replaces the state of each chunk of a column, at its end, by the state that enters it; p.states holds the state that enters
  // the tile. With `leave`, writes the joint state of the tile to p.states instead, where it is joined with other tiles. The
  // exponents of the fast path are small enough for N = float; the careful path needs double.
  template <template <typename> class State, typename N>
  VRWKV_FN void join(int direction, int column, bool leave) const {
    const Chunk<scalar_t> whole(p, b, index, c + column);
    PrefixState<State, N> prefix;
    if (!leave && p.states) {
      StateVector<State<T>, T> entering;
      whole.read_state(entering, direction);
      prefix.state = convert<N>(entering.get(0));
    }
    const double w = p.w[c + column];
    const N steps = DistanceFactors<N>(static_cast<N>(w)).steps;
    // Only the last chunk of a sequence may be shorter, and no state that passes it is used.
    TokenSpan<N> passage;
    if constexpr (std::is_same_v<N, double>) {
      passage = TokenSpan<N>::of(w, kMaxChunk);
    } else {
      passage = {exp_scaled_unclamped(static_cast<N>(-w * kMaxChunk)), N(kMaxChunk)};
    }
    for (int i = 0; i < rows; ++i) {
      const int row = direction == 0 ? i : rows - 1 - i;
      const auto own = read_state<State<T>>(row, direction, column);
      if (!leave) write_state(convert<T>(prefix.entering()), row, direction, column);
      prefix.append(PrefixState<State, N>{convert<N>(own)}, passage, steps);
    }
    if (!leave) return;
    // p.states holds states in the frame of the start of the tile.
    const Scaled<double> grow = TokenSpan<double>::of(-w, tokens).decay;
    State<double> held = convert<double>(prefix.entering());
    held.advance(grow.mantissa, 0.);
    held.exponent += grow.exponent;
    StateVector<State<T>, T> leaving;
    leaving.set(0, convert<T>(held));
    whole.write_state(leaving, direction);
  }

 private:
  VRWKV_FN T* state(int row, int direction, int field, int column) const {
    return states + ((row * 2 + direction) * Layout::kStateFields + field) * kColumns + column;
  }
};

// A thread's chunk for the functions of chunk.h: inputs and results in global memory, states and sums in shared memory.
template <typename P>
struct SharedChunk : Chunk<typename P::scalar_type> {
  using Base = Chunk<typename P::scalar_type>;
  using T = typename Base::T;
  const SharedTile<P>& tile;
  int row, column;

  VRWKV_FN SharedChunk(const SharedTile<P>& of, int which, int lane)
      : Base(of.p, of.b, of.index, of.c + lane), tile(of), row(which), column(lane) {
    this->first += row * kMaxChunk;
    this->length = tile.length(row);
  }

  VRWKV_FN void read_decay(DecayVector<T>& to, int n) const { to.set(0, tile.decay(n, column)); }
  template <typename State>
  VRWKV_FN void read_state(StateVector<State, T>& to, int direction) const {
    to.set(0, tile.template read_state<State>(row, direction, column));
  }
  template <typename State>
  VRWKV_FN void write_state(const StateVector<State, T>& from, int direction) const {
    const Decay<T> by = tile.decay(this->length, column);  // to the chunk's end
    State s = from.get(0);
    s.advance(by.inverse, T(0));
    s.exponent -= by.exponent;
    tile.write_state(s, row, direction, column);
  }
  VRWKV_FN void write_sums(const P&, const ChannelVector<T>& gw, const ChannelVector<T>& gu) const {
    *tile.sum(row, 0, column) = gw.x[0], *tile.sum(row, 1, column) = gu.x[0];
  }
};

struct Step {
  float factor;  // e^(-w)

  VRWKV_FN float operator()(float x, float fresh) const { return multiply_add(x, factor, fresh); }
};

// The fast path of both passes: a thread's chunk and its decay. A thread without a channel has no tokens.
template <typename P>
struct FastChunk {
  using scalar_t = typename P::scalar_type;
  const SharedTile<P>& tile;
  int row, column, length;
  float w = 0.f, u = 0.f;

  VRWKV_FN FastChunk(const SharedTile<P>& of, int which, int lane)
      : tile(of), row(which), column(lane), length(of.has_column(lane) ? of.length(which) : 0) {
    if (length > 0) w = of.p.w[of.c + lane], u = of.p.u[of.c + lane];
  }

  VRWKV_FN float read(int input, int t) const { return static_cast<float>(tile.input(input, row * kMaxChunk + t)[column]); }
  VRWKV_FN void write(int input, int t, float x) const {
    tile.input(input, row * kMaxChunk + t)[column] = static_cast<scalar_t>(x);
  }
  VRWKV_FN float key(int t) const { return read(kKeys, t); }
  VRWKV_FN float value(int t) const { return read(kValues, t) * tile.p.headroom; }

  VRWKV_FN Step step() const { return {::expf(-w)}; }
  // Bits by which the tokens of a chunk can shrink or grow a state.
  VRWKV_FN float reach() const { return ::fabsf(w) * (kMaxChunk * kLog2eFloat); }
  VRWKV_FN float growth() const { return w < 0.f ? ::ceilf(reach()) : 0.f; }
  VRWKV_FN float bonus_bits() const { return u * kLog2eFloat; }

  // Calls body(t) for the tokens of a chunk in the order of a direction, padding included.
  template <typename Body>
  VRWKV_FN void for_each_token(int direction, const Body& body) const {
    VRWKV_UNROLL
    for (int i = 0; i < kMaxChunk; ++i) body(direction == 0 ? i : kMaxChunk - 1 - i);
  }

  template <typename Read>
  VRWKV_FN Range extent(const Read& read) const {
    Range extent;
    for_each_token(0, [&](int t) {
      if (t < length) extent.include(read(t));
    });
    return extent;
  }
  VRWKV_FN Range keys() const {
    return extent([&](int t) { return key(t); });
  }
};

template <typename scalar_t, bool causal>
struct WkvForwardPass {
  using P = WkvForwardParams<scalar_t>;
  template <typename N>
  using State = WkvState<N>;
  static constexpr bool kCausal = causal;
  static constexpr int kFirstDirection = 0, kDirections = causal ? 1 : 2;

  struct Fast : FastChunk<P> {
    bool shares_exponent;
    float frame;  // no weight times 2^-frame is above 1, after growth and with the bonus included

    VRWKV_FN Fast(const SharedTile<P>& of, int which, int lane) : FastChunk<P>(of, which, lane) {
      const Range keys = this->keys();
      shares_exponent = this->length == 0 || (this->reach() <= kMaxSpread / 2 &&
                                              keys.spread() + this->reach() + ::fabsf(this->bonus_bits()) <= kMaxSpread &&
                                              ::fabsf(keys.top()) <= kMaxTop);
      frame = keys.top() + this->growth() + ::ceilf(::fmaxf(this->bonus_bits(), 0.f));
    }

    VRWKV_FN void states() const {
      WkvState<float> left, right;
      if (this->length > 0) {
        const auto step = this->step();
        float weights[kMaxChunk], values[kMaxChunk];
        left.exponent = right.exponent = frame;
        LargestWeight left_top{this->w}, right_top{this->w};
        this->for_each_token(0, [&](int t) {
          weights[t] = exp_shifted(this->key(t), -frame), values[t] = this->value(t);
          left.absorb(step, weights[t], values[t]);
          left_top.absorb(this->key(t));
        });
        left_top.rescale_to_largest(left);
        if constexpr (!causal) {
          this->for_each_token(1, [&](int t) {
            right.absorb(step, weights[t], values[t]);
            right_top.absorb(this->key(t));
          });
          right_top.rescale_to_largest(right);
        }
      }
      this->tile.write_state(left, this->row, 0, this->column);
      if constexpr (!causal) this->tile.write_state(right, this->row, 1, this->column);
    }

    VRWKV_FN bool outputs_share_exponent() const { return true; }

    // An entering state can grow, too. The smaller of two entering states, or the weights of the chunk, may vanish beside the
    // larger: below 2^-126, so that after growth by at most 2^32 and decay of the larger by as much they are still below float
    // precision.
    VRWKV_FN void outputs() const {
      if (this->length == 0) return;
      const P& p = this->tile.p;
      const auto left = this->tile.template read_state<WkvState<float>>(this->row, 0, this->column);
      WkvState<float> right;
      if constexpr (!causal) right = this->tile.template read_state<WkvState<float>>(this->row, 1, this->column);
      const float top = ::fmaxf(frame, ::fmaxf(left.exponent, right.exponent) + this->growth());
      const auto step = this->step();
      const float bonus = exp_shifted(this->u, 0.f), lift = 1.f / p.headroom;

      WkvState<float> after[causal ? 1 : kMaxChunk];  // the state to the right of each token
      if constexpr (!causal) {
        right.advance(power_of_two(right.exponent - top), 0.f);
        this->for_each_token(1, [&](int t) {
          after[t] = right;
          right.absorb(step, exp_shifted(this->key(t), -top), this->value(t));
        });
      }

      WkvState<float> s = left;
      s.advance(power_of_two(left.exponent - top), 0.f);
      this->for_each_token(0, [&](int t) {
        const float weight = exp_shifted(this->key(t), -top), v = this->value(t), self = weight * bonus;
        float numerator = multiply_add(self, v, s.a), denominator = self + s.c;
        if constexpr (!causal) numerator += after[t].a, denominator += after[t].c;
        s.absorb(step, weight, v);
        // The output of a token that sees only itself is exactly its value, as in Output.
        const float y = (denominator == self ? v : quotient(numerator, denominator)) * lift;
        this->write(kKeys, t, y);
        if (sizeof(scalar_t) == 2 && p.y_residual) this->write(kValues, t, y - this->read(kKeys, t));
        if (p.z && t < this->length)
          p.z[this->tile.offset(this->row * kMaxChunk + t) + this->column] = log_scaled(denominator, top);
      });
    }
  };
};

template <typename scalar_t, bool causal>
struct WkvBackwardPass {
  using P = WkvBackwardParams<scalar_t>;
  template <typename N>
  using State = GradState<N>;
  static constexpr bool kCausal = causal;
  static constexpr int kFirstDirection = causal ? 1 : 0, kDirections = causal ? 1 : 2;

  struct Fast : FastChunk<P> {
    bool shares_exponent;
    float frame;  // no e^(-z) times 2^-frame is above 1; sums may grow beyond

    VRWKV_FN Fast(const SharedTile<P>& of, int which, int lane) : FastChunk<P>(of, which, lane) {
      const Range shrinks = this->extent([&](int t) { return shrink(t); });
      shares_exponent =
          this->length == 0 || (this->reach() <= kMaxSpread / 2 && ::fabsf(this->bonus_bits()) <= kMaxSpread / 2 &&
                                ::fabsf(shrinks.top()) <= kMaxTop);
      frame = shrinks.top();
    }

    VRWKV_FN float shrink(int t) const { return -this->tile.log(this->row * kMaxChunk + t)[this->column]; }
    VRWKV_FN float y(int t) const {
      const float rounded = this->read(kOutputs, t);
      return (sizeof(scalar_t) == 2 ? rounded + this->read(kResiduals, t) : rounded) * this->tile.p.headroom;
    }

    VRWKV_FN void states() const {
      GradState<float> left, right;
      if (this->length > 0) {
        const auto step = this->step();
        const Counting counting(*this);
        float g[kMaxChunk], h[kMaxChunk];
        left.exponent = right.exponent = frame;
        LargestWeight left_top{this->w}, right_top{this->w};
        this->for_each_token(1, [&](int t) {
          g[t] = weighted(t, frame), h[t] = g[t] * y(t);
          absorb(right, step, counting, t, 1, g[t], h[t]);
          right_top.absorb(shrink(t));
        });
        right_top.rescale_to_largest(right);
        if constexpr (!causal) {
          this->for_each_token(0, [&](int t) {
            absorb(left, step, counting, t, 0, g[t], h[t]);
            left_top.absorb(shrink(t));
          });
          left_top.rescale_to_largest(left);
        }
      }
      this->tile.write_state(right, this->row, 1, this->column);
      if constexpr (!causal) this->tile.write_state(left, this->row, 0, this->column);
    }

    // An e^(-z) that vanishes beside the largest then also vanishes times any key and bonus, after any growth: below 2^-30.
    VRWKV_FN bool outputs_share_exponent() const {
      const Range keys = this->keys();
      return this->length == 0 || (keys.top() + top() <= kMaxSpread - 2 && ::fabsf(keys.top()) <= kMaxTop);
    }

    VRWKV_FN void outputs() const {
      const P& p = this->tile.p;
      const float lift = 1.f / p.headroom;
      float gw = 0.f, gu = 0.f;
      if (this->length > 0) {
        const float top = this->top(), bonus = exp_shifted(this->u, 0.f);
        const auto step = this->step();
        const Counting counting(*this);
        float gk_after[kMaxChunk], gv_after[kMaxChunk];  // from the outputs after each token
        {
          GradState<float> s = entering(1, top);
          this->for_each_token(1, [&](int t) {
            TokenGrad<float> grad;
            grad.add(s, exp_shifted(this->key(t), top), this->value(t), counting.own(t, 1));
            gk_after[t] = grad.gk, gv_after[t] = grad.gv, gw += grad.gw;
            const float g = weighted(t, top);
            absorb(s, step, counting, t, 1, g, g * y(t));
          });
        }
        GradState<float> s;
        if constexpr (!causal) s = entering(0, top);
        this->for_each_token(0, [&](int t) {
          const float key = exp_shifted(this->key(t), top), v = this->value(t), own_y = y(t), g = weighted(t, top);
          TokenGrad<float> grad;
          grad.add_self(key * bonus * g, v, own_y, counting.far(t));
          if constexpr (!causal) {
            grad.add(s, key, v, counting.own(t, 0));
            absorb(s, step, counting, t, 0, g, g * own_y);
          }
          gw += grad.gw, gu += grad.gu;
          this->write(kKeys, t, (grad.gk + gk_after[t]) * lift);
          this->write(kValues, t, grad.gv + gv_after[t]);
        });
      }
      *this->tile.sum(this->row, 0, this->column) = gw * lift;
      *this->tile.sum(this->row, 1, this->column) = gu * lift;
    }

   private:
    // gy e^(-z) 2^-top
    VRWKV_FN float weighted(int t, float top) const { return exp_shifted(shrink(t), -top) * this->read(kGrads, t); }

    VRWKV_FN GradState<float> state(int direction) const {
      return this->tile.template read_state<GradState<float>>(this->row, direction, this->column);
    }
    VRWKV_FN float top() const {
      const float right = state(1).exponent, left = causal ? right : state(0).exponent;
      return ::fmaxf(frame, ::fmaxf(left, right));
    }
    VRWKV_FN GradState<float> entering(int direction, float top) const {
      GradState<float> s = state(direction);
      s.advance(power_of_two(s.exponent - top), 0.f);
      return s;
    }

    // The distances of the tokens, for GradState and TokenGrad.
    struct Counting {
      float first;
      DistanceFactors<float> factors;
      Distances<float> distances;

      VRWKV_FN explicit Counting(const Fast& chunk)
          : first(static_cast<float>(chunk.tile.first + chunk.row * kMaxChunk)),
            factors(chunk.w),
            distances{static_cast<float>(chunk.tile.p.tokens), causal} {}

      VRWKV_FN float far(int t) const { return factors.origins * (distances.far(first + t) - 1.f); }
      VRWKV_FN float own(int t, int direction) const { return factors.origins * distances.own(first + t, direction); }
      VRWKV_FN float origin(int t, int direction) const { return factors.origins * distances.origin(first + t, direction); }
    };

    // Absorbs g and h of token t.
    static VRWKV_FN void absorb(GradState<float>& s, const Step& step, const Counting& counting, int t, int direction, float g,
                                float h) {
      s.absorb(step, g, h, counting.factors.steps, counting.origin(t, direction));
    }
  };
};

}  // namespace vrwkv
}  // namespace
