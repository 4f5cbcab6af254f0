// Bi-WKV over a block of neighbouring channels and a tile of tokens, held in fast memory: what a block of CUDA threads does, one
// step of one thread at a time, so that a test can run it on the CPU. A thread has a chunk of kMaxChunk tokens of one channel.
//
// The weights of a chunk share one exponent, and states follow their recurrences, which are too short here for roundings to add up:
// a token takes an exponential and a few multiply-adds for each state. Where the weights of a chunk lie too far apart for that
// (`fits`), its block takes the careful way of tile.h instead, from memory.
#pragma once

#include "tile.h"

#if defined(__CUDACC__)
#define VRWKV_UNROLL _Pragma("unroll")
#else
#define VRWKV_UNROLL
#endif

namespace {
namespace vrwkv {

constexpr int kColumns = 32;  // channels of a block, one in each lane of a warp
static_assert(kWidth == 1, "a thread has one channel");

constexpr float kBits = static_cast<float>(kLog2e);

// e^x 2^n for an integral n, where that is at most 2^127; 0 below 2^-126. That log2(e) is rounded changes weights that are e^d
// apart by 1e-8 d of each other.
VRWKV_FN float exp_shifted(float x, float n) {
  const float power = multiply_add(x, kBits, n);
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

// The largest and the smallest of some numbers; NaN does not count.
struct Extent {
  float high = -INFINITY, low = INFINITY;

  VRWKV_FN void include(float x) { high = ::fmaxf(high, x), low = ::fminf(low, x); }
  // In powers of 2.
  VRWKV_FN float spread() const { return (high - low) * kBits; }
  VRWKV_FN float top() const { return ::ceilf(high * kBits); }
};

// Bits between the largest and the smallest weight that one exponent serves, and how large exponents may be: e^x has them exactly.
constexpr float kMaxSpread = 64.f;
constexpr float kMaxTop = 65536.f;

template <typename P>
struct BlockOf;

// Inputs that a block holds, in this order.
enum BlockInput { kKeys, kValues, kGrads, kOutputs, kResiduals };

// What stands for tokens past the last one of a sequence, in its last chunk: all else is 0. Their weights are 0, and what they do
// to states goes nowhere.
template <typename scalar_t>
VRWKV_FN scalar_t key_of_none() {
  return static_cast<scalar_t>(sizeof(scalar_t) == 2 && !std::is_same_v<scalar_t, c10::BFloat16> ? -65504.f : -3e38f);
}
constexpr float kLogOfNone = 3e38f;

template <typename scalar_t>
struct BlockOf<Forward<scalar_t>> {
  static constexpr int kInputs = 2;
  static constexpr bool kHasLogs = false;
  static constexpr int kStateFields = WkvState<float>::kFields;
};

template <typename scalar_t>
struct BlockOf<Backward<scalar_t>> {
  static constexpr int kInputs = sizeof(scalar_t) == 2 ? 5 : 4;
  static constexpr bool kHasLogs = true;  // z
  static constexpr int kStateFields = GradState<float>::kFields;
};

// A tile is a chunk of the problem: `rows` chunks of a block's own, one in each warp.
template <typename P>
struct Block {
  using scalar_t = typename P::scalar_type;
  using T = typename P::acc_t;
  using Of = BlockOf<P>;
  // In double the careful way is the only one, and it reads memory.
  static constexpr bool kFast = std::is_same_v<T, float>;

  const P& p;
  int rows;
  scalar_t* inputs;
  T *logs, *states, *sums;
  int64_t b, tile, c, first;
  int tokens;

  // `index` counts blocks of channels within tiles within images. The memory, of bytes(rows), is aligned to 16 bytes.
  VRWKV_FN Block(const P& problem, int row_count, void* memory, int64_t index) : p(problem), rows(row_count) {
    const int64_t columns = column_blocks(p.channels), count = rows * kMaxChunk * kColumns;
    inputs = static_cast<scalar_t*>(memory);
    logs = reinterpret_cast<T*>(inputs + (kFast ? Of::kInputs * count : 0));
    states = logs + (kFast && Of::kHasLogs ? count : 0);
    sums = states + rows * kColumns * 2 * Of::kStateFields;
    b = index / columns / p.chunks, tile = index / columns % p.chunks, c = index % columns * kColumns;
    first = tile * p.chunk_length;
    tokens = static_cast<int>(p.tokens - first < p.chunk_length ? p.tokens - first : p.chunk_length);
  }

  static VRWKV_FN int64_t column_blocks(int64_t channels) { return (channels + kColumns - 1) / kColumns; }
  static VRWKV_FN size_t bytes(int rows) {
    const size_t tokens = kFast ? kMaxChunk : 0;
    const size_t token = Of::kInputs * sizeof(scalar_t) + (Of::kHasLogs ? sizeof(T) : 0);
    return rows * kColumns * (tokens * token + (2 * Of::kStateFields + (Of::kHasLogs ? 2 : 0)) * sizeof(T));
  }

  VRWKV_FN scalar_t* input(int which, int t) const { return inputs + (which * rows * kMaxChunk + t) * kColumns; }
  VRWKV_FN T* log(int t) const { return logs + t * kColumns; }
  VRWKV_FN int64_t offset(int t) const { return (b * p.tokens + first + t) * p.channels + c; }
  VRWKV_FN bool has_column(int column) const { return c + column < p.channels; }
  // Tokens of a row's chunk.
  VRWKV_FN int length(int row) const {
    const int left = tokens - row * kMaxChunk;
    return left < 0 ? 0 : (left < kMaxChunk ? left : kMaxChunk);
  }
  VRWKV_FN T* sum(int row, int which, int column) const { return sums + (row * 2 + which) * kColumns + column; }

  VRWKV_FN Decay<T> decay(int n, int column) const {
    const T* row = p.decay + n * p.channels + c + column;
    const int64_t field = p.decay_rows * p.channels;
    return {row[0], row[field], row[2 * field]};
  }

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

  // Turns what each chunk of a column holds, at its end, into what enters it. With `leave`, for the tile as a whole: what it
  // holds goes to p.states, where it is joined with that of other tiles. Else what enters the tile comes from there. The fast
  // way's exponents are small enough for N = float, the careful way needs double.
  template <template <typename> class State, typename N>
  VRWKV_FN void join(int direction, int column, bool leave) const {
    const Tile<scalar_t> whole(p, b, tile, c + column);
    Carry<State, N> carry;
    if (!leave && p.states) {
      StateLanes<State<T>, T> entering;
      whole.read_state(entering, direction);
      carry.state = convert<N>(entering.get(0));
    }
    const double w = p.w[c + column];
    const N steps = Counting<N>(static_cast<N>(w)).steps;
    // Only the last chunk of a sequence may be shorter, and what passes it goes nowhere.
    Passage<N> passage;
    if constexpr (std::is_same_v<N, double>) {
      passage = Passage<N>::of(w, kMaxChunk);
    } else {
      const Decay<T> by = decay(kMaxChunk, column);
      passage = {{by.inverse, -by.exponent}, N(kMaxChunk)};
    }
    for (int i = 0; i < rows; ++i) {
      const int row = direction == 0 ? i : rows - 1 - i;
      const auto own = read_state<State<T>>(row, direction, column);
      if (!leave) write_state(convert<T>(carry.enter()), row, direction, column);
      carry.append(Carry<State, N>{convert<N>(own)}, passage, steps);
    }
    if (!leave) return;
    // In the frame of its start, as a chunk of the problem.
    const Scaled<double> grow = Passage<double>::of(-w, tokens).decay;
    State<double> held = convert<double>(carry.enter());
    held.advance(grow.mantissa, 0.);
    held.exponent += grow.exponent;
    StateLanes<State<T>, T> leaving;
    leaving.set(0, convert<T>(held));
    whole.write_state(leaving, direction);
  }

 private:
  VRWKV_FN T* state(int row, int direction, int field, int column) const {
    return states + ((row * 2 + direction) * Of::kStateFields + field) * kColumns + column;
  }
};

// A thread's chunk as tile.h takes it: its inputs and results in memory, its states and sums in the block.
template <typename P>
struct ChunkOfBlock : Tile<typename P::scalar_type> {
  using Base = Tile<typename P::scalar_type>;
  using T = typename Base::T;
  const Block<P>& block;
  int row, column;

  VRWKV_FN ChunkOfBlock(const Block<P>& of, int which, int lane)
      : Base(of.p, of.b, of.tile, of.c + lane), block(of), row(which), column(lane) {
    this->first += row * kMaxChunk;
    this->length = block.length(row);
  }

  template <typename State>
  VRWKV_FN void read_state(StateLanes<State, T>& to, int direction) const {
    to.set(0, block.template read_state<State>(row, direction, column));
  }
  template <typename State>
  VRWKV_FN void write_state(const StateLanes<State, T>& from, int direction) const {
    const Decay<T> by = block.decay(this->length, column);  // to the chunk's end
    State s = from.get(0);
    s.advance(by.inverse, T(0));
    s.exponent -= by.exponent;
    block.write_state(s, row, direction, column);
  }
  VRWKV_FN void write_sums(const P&, const Lanes<T>& gw, const Lanes<T>& gu) const {
    *block.sum(row, 0, column) = gw.x[0], *block.sum(row, 1, column) = gu.x[0];
  }
};

// The largest weight in a state, e^(x - w d). A state goes out with its exponent: a larger one makes others vanish beside it, and
// TokenGrad wants none larger.
struct Top {
  float w, high = -INFINITY;

  VRWKV_FN void absorb(float x) { high = ::fmaxf(high - w, x); }
  // From the exponent that the state has.
  template <typename State>
  VRWKV_FN void move(State& s) const {
    const float top = ::ceilf(high * kBits);
    s.advance(any_power_of_two(s.exponent - top), 0.f);
    s.exponent = top;
  }
};

// What the fast ways of both passes share: a thread's chunk and its decay. A thread without a channel has no tokens.
template <typename P>
struct FastChunk {
  using scalar_t = typename P::scalar_type;
  const Block<P>& block;
  int row, column, length;
  float w = 0.f, u = 0.f;

  VRWKV_FN FastChunk(const Block<P>& of, int which, int lane)
      : block(of), row(which), column(lane), length(of.has_column(lane) ? of.length(which) : 0) {
    if (length > 0) w = of.p.w[of.c + lane], u = of.p.u[of.c + lane];
  }

  VRWKV_FN float read(int input, int t) const { return static_cast<float>(block.input(input, row * kMaxChunk + t)[column]); }
  VRWKV_FN void write(int input, int t, float x) const {
    block.input(input, row * kMaxChunk + t)[column] = static_cast<scalar_t>(x);
  }
  VRWKV_FN float key(int t) const { return read(kKeys, t); }
  VRWKV_FN float value(int t) const { return read(kValues, t) * block.p.headroom; }

  // e^(-w)
  VRWKV_FN float step() const {
    const Decay<float> by = block.decay(1, column);
    return by.inverse * any_power_of_two(-by.exponent);
  }
  // Powers of 2 by which a chunk's tokens can shrink or grow a state.
  VRWKV_FN float reach() const { return ::fabsf(w) * (kMaxChunk * kBits); }
  VRWKV_FN float growth() const { return w < 0.f ? ::ceilf(reach()) : 0.f; }
  VRWKV_FN float bonus_bits() const { return u * kBits; }

  // Calls body(t) for the tokens of a chunk in the order of a direction, for those past the last one, too.
  template <typename Body>
  VRWKV_FN void for_each_token(int direction, const Body& body) const {
    VRWKV_UNROLL
    for (int i = 0; i < kMaxChunk; ++i) body(direction == 0 ? i : kMaxChunk - 1 - i);
  }

  template <typename Read>
  VRWKV_FN Extent extent(const Read& read) const {
    Extent extent;
    for_each_token(0, [&](int t) {
      if (t < length) extent.include(read(t));
    });
    return extent;
  }
  VRWKV_FN Extent keys() const {
    return extent([&](int t) { return key(t); });
  }
};

template <typename scalar_t, bool causal>
struct ForwardPass {
  using P = Forward<scalar_t>;
  using T = typename P::acc_t;
  template <typename N>
  using State = WkvState<N>;
  static constexpr int kFirstDirection = 0, kDirections = causal ? 1 : 2;

  static VRWKV_FN void careful_states(const Block<P>& block, int row, int column) {
    forward_states<causal>(block.p, ChunkOfBlock<P>(block, row, column));
  }
  static VRWKV_FN void careful_outputs(const Block<P>& block, int row, int column) {
    forward_outputs<causal>(block.p, ChunkOfBlock<P>(block, row, column));
  }

  struct Fast : FastChunk<P> {
    bool fits;
    float frame;  // over 2^frame no weight of a token is above 1, be it grown or with the bonus

    VRWKV_FN Fast(const Block<P>& of, int which, int lane) : FastChunk<P>(of, which, lane) {
      const Extent keys = this->keys();
      fits = this->length == 0 ||
             (this->reach() <= kMaxSpread / 2 && keys.spread() + this->reach() + ::fabsf(this->bonus_bits()) <= kMaxSpread &&
              ::fabsf(keys.top()) <= kMaxTop);
      frame = keys.top() + this->growth() + ::ceilf(::fmaxf(this->bonus_bits(), 0.f));
    }

    VRWKV_FN void states() const {
      WkvState<float> left, right;
      if (this->length > 0) {
        const float step = this->step();
        float weights[kMaxChunk], values[kMaxChunk];
        left.exponent = right.exponent = frame;
        Top left_top{this->w}, right_top{this->w};
        this->for_each_token(0, [&](int t) {
          weights[t] = exp_shifted(this->key(t), -frame), values[t] = this->value(t);
          absorb(left, weights[t], values[t], step);
          left_top.absorb(this->key(t));
        });
        left_top.move(left);
        if constexpr (!causal) {
          this->for_each_token(1, [&](int t) {
            absorb(right, weights[t], values[t], step);
            right_top.absorb(this->key(t));
          });
          right_top.move(right);
        }
      }
      this->block.write_state(left, this->row, 0, this->column);
      if constexpr (!causal) this->block.write_state(right, this->row, 1, this->column);
    }

    VRWKV_FN bool outputs_fit() const { return true; }

    // A state that entered can grow, too. The smaller of two that enter, or the chunk's own weights, may vanish beside the larger:
    // below 2^-126, so that growth by at most 2^32 and decay of the larger by as much leave them below what a float can tell.
    VRWKV_FN void outputs() const {
      if (this->length == 0) return;
      const P& p = this->block.p;
      const auto left = this->block.template read_state<WkvState<float>>(this->row, 0, this->column);
      WkvState<float> right;
      if constexpr (!causal) right = this->block.template read_state<WkvState<float>>(this->row, 1, this->column);
      const float top = ::fmaxf(frame, ::fmaxf(left.exponent, right.exponent) + this->growth());
      const float step = this->step(), bonus = exp_shifted(this->u, 0.f), lift = 1.f / p.headroom;

      WkvState<float> after[causal ? 1 : kMaxChunk];  // the state to the right of each token
      if constexpr (!causal) {
        right.advance(power_of_two(right.exponent - top), 0.f);
        this->for_each_token(1, [&](int t) {
          after[t] = right;
          absorb(right, exp_shifted(this->key(t), -top), this->value(t), step);
        });
      }

      WkvState<float> s = left;
      s.advance(power_of_two(left.exponent - top), 0.f);
      this->for_each_token(0, [&](int t) {
        const float weight = exp_shifted(this->key(t), -top), v = this->value(t), self = weight * bonus;
        float numerator = multiply_add(self, v, s.a), denominator = self + s.c;
        if constexpr (!causal) numerator += after[t].a, denominator += after[t].c;
        absorb(s, weight, v, step);
        // A token that only sees itself gets its very value, as in Output.
        const float y = (denominator == self ? v : quotient(numerator, denominator)) * lift;
        this->write(kKeys, t, y);
        if (sizeof(scalar_t) == 2 && p.y_residual) this->write(kValues, t, y - this->read(kKeys, t));
        if (p.z && t < this->length)
          p.z[this->block.offset(this->row * kMaxChunk + t) + this->column] = log_scaled(denominator, top);
      });
    }

   private:
    static VRWKV_FN void absorb(WkvState<float>& s, float weight, float v, float step) {
      s.a = multiply_add(s.a, step, weight * v);
      s.c = multiply_add(s.c, step, weight);
    }
  };
};

template <typename scalar_t, bool causal>
struct BackwardPass {
  using P = Backward<scalar_t>;
  using T = typename P::acc_t;
  template <typename N>
  using State = GradState<N>;
  static constexpr int kFirstDirection = causal ? 1 : 0, kDirections = causal ? 1 : 2;

  static VRWKV_FN void careful_states(const Block<P>& block, int row, int column) {
    backward_states<causal>(block.p, ChunkOfBlock<P>(block, row, column));
  }
  static VRWKV_FN void careful_outputs(const Block<P>& block, int row, int column) {
    backward_outputs<causal>(block.p, ChunkOfBlock<P>(block, row, column));
  }

  struct Fast : FastChunk<P> {
    bool fits;
    float frame;  // over 2^frame no e^(-z) is above 1; sums may grow beyond

    VRWKV_FN Fast(const Block<P>& of, int which, int lane) : FastChunk<P>(of, which, lane) {
      const Extent shrinks = this->extent([&](int t) { return shrink(t); });
      fits = this->length == 0 || (this->reach() <= kMaxSpread / 2 && ::fabsf(this->bonus_bits()) <= kMaxSpread / 2 &&
                                   ::fabsf(shrinks.top()) <= kMaxTop);
      frame = shrinks.top();
    }

    VRWKV_FN float shrink(int t) const { return -this->block.log(this->row * kMaxChunk + t)[this->column]; }
    VRWKV_FN float y(int t) const {
      const float rounded = this->read(kOutputs, t);
      return (sizeof(scalar_t) == 2 ? rounded + this->read(kResiduals, t) : rounded) * this->block.p.headroom;
    }

    VRWKV_FN void states() const {
      GradState<float> left, right;
      if (this->length > 0) {
        const Walk walk(*this);
        float g[kMaxChunk], h[kMaxChunk];
        left.exponent = right.exponent = frame;
        Top left_top{this->w}, right_top{this->w};
        this->for_each_token(1, [&](int t) {
          g[t] = weighted(t, frame), h[t] = g[t] * y(t);
          walk.absorb(right, t, 1, g[t], h[t]);
          right_top.absorb(shrink(t));
        });
        right_top.move(right);
        if constexpr (!causal) {
          this->for_each_token(0, [&](int t) {
            walk.absorb(left, t, 0, g[t], h[t]);
            left_top.absorb(shrink(t));
          });
          left_top.move(left);
        }
      }
      this->block.write_state(right, this->row, 1, this->column);
      if constexpr (!causal) this->block.write_state(left, this->row, 0, this->column);
    }

    // What vanishes of e^(-z) beside the largest then vanishes times any key and bonus, too, however it grows: below 2^-30.
    VRWKV_FN bool outputs_fit() const {
      const Extent keys = this->keys();
      return this->length == 0 || (keys.top() + top() <= kMaxSpread - 2 && ::fabsf(keys.top()) <= kMaxTop);
    }

    VRWKV_FN void outputs() const {
      const P& p = this->block.p;
      const float lift = 1.f / p.headroom;
      float gw = 0.f, gu = 0.f;
      if (this->length > 0) {
        const float top = this->top(), bonus = exp_shifted(this->u, 0.f);
        const Walk walk(*this);
        float gk_after[kMaxChunk], gv_after[kMaxChunk];  // what the outputs after each token give to it
        {
          GradState<float> s = entering(1, top);
          this->for_each_token(1, [&](int t) {
            gk_after[t] = gv_after[t] = 0.f;
            walk.give(s, t, 1, exp_shifted(this->key(t), top), this->value(t), gk_after[t], gv_after[t], gw);
            const float g = weighted(t, top);
            walk.absorb(s, t, 1, g, g * y(t));
          });
        }
        GradState<float> s;
        if constexpr (!causal) s = entering(0, top);
        this->for_each_token(0, [&](int t) {
          const float key = exp_shifted(this->key(t), top), v = this->value(t), own_y = y(t), g = weighted(t, top);
          const float self = key * bonus * g, part = self * (v - own_y);
          float gk = gk_after[t] + part, gv = gv_after[t] + self;
          gu += part;
          gw = multiply_add(walk.far(t), part, gw);
          if constexpr (!causal) {
            walk.give(s, t, 0, key, v, gk, gv, gw);
            walk.absorb(s, t, 0, g, g * own_y);
          }
          this->write(kKeys, t, gk * lift);
          this->write(kValues, t, gv);
        });
      }
      *this->block.sum(this->row, 0, this->column) = gw * lift;
      *this->block.sum(this->row, 1, this->column) = gu * lift;
    }

   private:
    // gy e^(-z) 2^-top
    VRWKV_FN float weighted(int t, float top) const { return exp_shifted(shrink(t), -top) * this->read(kGrads, t); }

    VRWKV_FN GradState<float> state(int direction) const {
      return this->block.template read_state<GradState<float>>(this->row, direction, this->column);
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

    // Steps of the states, and their distances, as in GradState and TokenGrad.
    struct Walk {
      float step, first;
      Counting<float> counting;
      Distances<float> distances;

      VRWKV_FN explicit Walk(const Fast& chunk)
          : step(chunk.step()),
            first(static_cast<float>(chunk.block.first + chunk.row * kMaxChunk)),
            counting(chunk.w),
            distances{static_cast<float>(chunk.block.p.tokens), causal} {}

      VRWKV_FN float far(int t) const { return counting.origins * (distances.far(first + t) - 1.f); }

      VRWKV_FN void absorb(GradState<float>& s, int t, int direction, float g, float h) const {
        const float origin = counting.origins * distances.origin(first + t, direction);
        s.dg = multiply_add(multiply_add(counting.steps, s.g, s.dg), step, origin * g);
        s.dh = multiply_add(multiply_add(counting.steps, s.h, s.dh), step, origin * h);
        s.g = multiply_add(s.g, step, g);
        s.h = multiply_add(s.h, step, h);
      }

      VRWKV_FN void give(const GradState<float>& s, int t, int direction, float key, float v, float& gk, float& gv,
                         float& gw) const {
        const float part = key * (s.g * v - s.h), own = counting.origins * distances.own(first + t, direction);
        gv = multiply_add(key, s.g, gv);
        gk += part;
        gw -= multiply_add(own, part, key * (s.dg * v - s.dh));
      }
    };
  };
};

}  // namespace vrwkv
}  // namespace
