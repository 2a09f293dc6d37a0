// Paged attention, one item at a time. A query row's result depends on its own q and context
// only: the context is walked in rounds of call.step tokens that start at fixed positions, every
// sum runs over tokens (or head_dim) in rising order whatever the tile, a round that a row
// cannot see leaves its state untouched, and tokens masked inside a round add exact zeros.
// After call.split tokens a fresh state starts, and states are merged in order, so that a long
// context may be cut among threads without changing a bit.
//
// Where the machine multiplies bfloat16 pairs (AVX512-BF16, AMX tiles) and KV is bfloat16, q and the
// softmax weights are rounded to bfloat16; elsewhere they stay in float32. Prefill and decode share
// one path.
#include "attention.h"
#include "lanes.h"
#include "tiles.h"

namespace chiliad {
namespace {

constexpr int kStrip = 16;  // tokens: the unit of a score's computation, and never across pages
constexpr int kStrips = kStepTokens / kStrip;
constexpr int kPerStrip = kStrip / kLanes;
constexpr float kLowest = -__builtin_inff();
constexpr float kLog2e = 1.44269504088896341f;

// Which cache to fetch into, as __builtin_prefetch counts them; measured: on a Zen 5 the L1 is best (a
// second level hint costs 15 %), with tiles, whose operands fill the L1, any but that.
#if CHILIAD_AMX
constexpr int kCache = 1;
#else
constexpr int kCache = 3;
#endif

CHILIAD_INLINE int least(int a, int b) { return a < b ? a : b; }
CHILIAD_INLINE int most(int a, int b) { return a > b ? a : b; }
CHILIAD_INLINE int item_bytes(const AttentionCall& call) { return call.bfloat16 ? 2 : 4; }

std::int64_t padded(int head_dim) { return (head_dim + 31) / 32 * 32; }

// Where scratch lies. `weights` are scores first, then softmax weights: [kTileRows, kStepTokens].
// q, state and total are per head of the item.
struct Scratch {
  float *weights, *state, *total, *q;
  Scratch(float* at, int head_dim, int heads)
      : weights(at), state(at + kTileRows * kStepTokens), total(state + heads * state_floats(head_dim)),
        q(total + heads * state_floats(head_dim)) {}
};

std::int64_t scratch_floats(int head_dim, int heads) {
  return heads * (2 * state_floats(head_dim) + kTileRows * padded(head_dim)) + kTileRows * kStepTokens;
}

// A tile's softmax state: per row the maximum score, the sum of weights (still one per lane: a
// token's lane is fixed) and the weighted values.
struct State {
  float *maximum, *sums, *values;
  explicit State(float* at)
      : maximum(at), sums(at + kTileRows), values(at + kTileRows * (1 + kStrip)) {}
};

// ---- the pages of a round ----

struct Round {
  const char *k[kStrips], *v[kStrips];  // of each strip of 16 tokens
  int start;  // the first strip's first token
  int count;  // strips, only those that some row of the tile sees
};

// Tokens [begin, begin + call.step) within [low, high).
Round round_of(const AttentionCall& call, const AttentionTile& tile, int head, int begin, int low, int high) {
  Round round;
  const int first = most(low - begin, 0) / call.span * call.span;
  round.start = begin + first;
  round.count = (least(high - begin, call.step) - first + kStrip - 1) / kStrip;
  const std::int64_t item = item_bytes(call), pair = call.bfloat16 ? 2 : 1;
  const std::int64_t head_bytes = std::int64_t{call.block_tokens} * call.head_dim * item;
  int block = round.start / call.block_tokens, offset = round.start % call.block_tokens;
  for (int s = 0; s < round.count; ++s) {
    const char* page = reinterpret_cast<const char*>(call.arena) +
                       tile.table[block * call.table_stride] * call.page_bytes + head * head_bytes;
    round.k[s] = page + offset * pair * item;
    round.v[s] = page + call.num_kv_heads * head_bytes + std::int64_t{offset} * call.head_dim * item;
    offset += kStrip;
    if (offset == call.block_tokens) offset = 0, ++block;
  }
  return round;
}

// Fetches what comes after the round at hand, page after page in the order of addresses: the
// blocks lie anywhere in the arena, and reading them head by head, K here and V there, would
// leave the hardware's own prefetching behind. Ends with the first round of the next item.
class Ahead {
 public:
  Ahead(const AttentionCall& call, const AttentionTile& tile, const AttentionTile* next)
      : call_(call), next_(next), chunk_((tile.head_end - tile.head_begin) * head_bytes()),
        per_round_(call.step / call.block_tokens * 2 * (chunk_ / 64)) {
    if (per_round_ > 0) open(tile, false);
  }

  // Lines to fetch while one head of one round is computed.
  int per_round(int heads) const { return (per_round_ + heads - 1) / heads; }

  CHILIAD_INLINE void take(int lines) {
    while (lines > 0) {
      if (at_ == end_ && !advance()) return;
      for (; lines > 0 && at_ != end_; --lines, at_ += 64) __builtin_prefetch(at_, 0, kCache);
    }
  }

 private:
  std::int64_t head_bytes() const { return std::int64_t{call_.block_tokens} * call_.head_dim * item_bytes(call_); }

  void open(const AttentionTile& tile, bool first_round) {
    const int group = call_.num_heads / call_.num_kv_heads;
    const int low = call_.window > 0 ? most(tile.position + tile.begin / group - call_.window + 1, 0) : 0;
    const int high = least(tile.position + (tile.end - 1) / group + 1, tile.last_split * call_.split);
    const int begin = most(low / call_.step * call_.step, tile.first_split * call_.split);
    tile_ = &tile;
    block_ = (first_round ? begin : begin + call_.step) / call_.block_tokens;
    last_block_ = ((first_round ? least(high, begin + call_.step) : high) + call_.block_tokens - 1) / call_.block_tokens;
    values_ = true;
  }

  bool advance() {
    if (tile_ == nullptr) return false;
    values_ = !values_;
    if (!values_ && block_ >= last_block_) {
      if (next_ == nullptr) return tile_ = nullptr, false;
      open(*next_, true);
      next_ = nullptr;
      return advance();
    }
    at_ = reinterpret_cast<const char*>(call_.arena) + tile_->table[block_ * call_.table_stride] * call_.page_bytes +
          (tile_->head_begin + (values_ ? call_.num_kv_heads : 0)) * head_bytes();
    end_ = at_ + chunk_;
    block_ += values_;
    return true;
  }

  const AttentionCall& call_;
  const AttentionTile *tile_ = nullptr, *next_;
  std::int64_t chunk_;
  int per_round_, block_ = 0, last_block_ = 0;
  bool values_ = false;
  const char *at_ = nullptr, *end_ = nullptr;
};

// ---- the path of vectors ----

// How K and V are stored, and what multiplies them: Other is the type of queries and weights, `add`
// adds one element's (pair's) products with a vector of K or V to each row's sum.
struct Float32 {
  using T = float;
  using Other = float;
  static constexpr int kPair = 1;
  struct Vector {
    Vec x;
  };
  static CHILIAD_INLINE Vector load(const float* p) { return {vload(p)}; }
  static CHILIAD_INLINE void store(float* p, Vec x) { vstore(p, x); }
  template <int kRows, int kVectors>
  static CHILIAD_INLINE void add(const float* other, std::int64_t stride, const Vector* v, Vec (*sums)[kVectors]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec a = vset(other[r * stride]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sums[r][i] = vfma(a, v[i].x, sums[r][i]);
    }
  }
  static CHILIAD_INLINE float add(const float* other, const float* p, float sum) { return __builtin_fmaf(*other, *p, sum); }
};

struct BFloat16 {
  using T = bf16;
  static constexpr int kPair = 2;
#if defined(__AVX512BF16__)
  using Other = bf16;
  struct Vector {
    __m512bh x;
  };
  static CHILIAD_INLINE Vector load(const bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
  static CHILIAD_INLINE void store(bf16* p, Vec x) { vstore_bf16(p, x); }
  template <int kRows, int kVectors>
  static CHILIAD_INLINE void add(const bf16* other, std::int64_t stride, const Vector* v, Vec (*sums)[kVectors]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int pair;
      std::memcpy(&pair, other + r * stride, 4);
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], a, v[i].x);
    }
  }
#else
  using Other = float;
  struct Vector {
    Vec even, odd;
  };
  static CHILIAD_INLINE Vector load(const bf16* p) {
    Vector v;
    vload_pairs(p, v.even, v.odd);
    return v;
  }
  static CHILIAD_INLINE void store(float* p, Vec x) { vstore(p, x); }
  template <int kRows, int kVectors>
  static CHILIAD_INLINE void add(const float* other, std::int64_t stride, const Vector* v, Vec (*sums)[kVectors]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec a = vset(other[r * stride]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sums[r][i] = vfma(a, v[i].even, sums[r][i]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec b = vset(other[r * stride + 1]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sums[r][i] = vfma(b, v[i].odd, sums[r][i]);
    }
  }
#endif
  static CHILIAD_INLINE float value(float x) { return x; }
  static CHILIAD_INLINE float value(bf16 x) { return to_float(x); }
  static CHILIAD_INLINE float add(const Other* other, const bf16* p, float sum) {
    sum = __builtin_fmaf(value(other[0]), to_float(p[0]), sum);
    return __builtin_fmaf(value(other[1]), to_float(p[1]), sum);
  }
};

// How many rows a register block holds, and how many strips or vectors beside them.
constexpr int kBlockRows = kLanes == 16 ? 8 : 4;
constexpr int score_strips(int rows) {
  return kLanes == 16 ? (rows <= 3 ? 4 : 2) : (kLanes == 8 && rows <= 2 ? 2 : 1);
}
constexpr int mix_vectors(int rows) { return kLanes == 16 && rows <= 3 ? 4 : 2; }

// scores[r][strip * 16 + t] = q[r] . K[t], for kRows rows and kCount strips.
template <class KV, int kRows, int kCount>
CHILIAD_INLINE void score_block(const typename KV::Other* q, int head_dim, std::int64_t width, const char* const* k,
                                int block_tokens, float* scores) {
  constexpr int kVectors = kCount * kPerStrip;
  const typename KV::T* at[kCount];
  for (int s = 0; s < kCount; ++s) at[s] = reinterpret_cast<const typename KV::T*>(k[s]);
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sums[r][i] = vset(0.0f);
  std::int64_t offset = 0;
  const std::int64_t stride = std::int64_t{block_tokens} * KV::kPair;
  for (int d = 0; d < head_dim; d += KV::kPair, offset += stride) {
    typename KV::Vector v[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) v[i] = KV::load(at[i / kPerStrip] + offset + (i % kPerStrip) * kLanes * KV::kPair);
    KV::template add<kRows, kVectors>(q + d, width, v, sums);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) vstore(scores + r * kStepTokens + i * kLanes, sums[r][i]);
}

template <class KV, int kRows>
void score_rows(const AttentionCall& call, const Round& round, const typename KV::Other* q, float* scores, Ahead& ahead,
                int lines) {
  constexpr int kCount = score_strips(kRows);
  const std::int64_t width = padded(call.head_dim);
  int s = 0;
  auto pass = [&]<int kStripsAtOnce>() {
    for (; s + kStripsAtOnce <= round.count; s += kStripsAtOnce) {
      ahead.take(lines * kStripsAtOnce / kStrips);
      score_block<KV, kRows, kStripsAtOnce>(q, call.head_dim, width, round.k + s, call.block_tokens, scores + s * kStrip);
    }
  };
  pass.template operator()<kCount>();
  if constexpr (kCount > 2) pass.template operator()<2>();
  if constexpr (kCount > 1) pass.template operator()<1>();
}

// Softmax weights of row r of a tile, as the values are multiplied with them.
template <class KV>
CHILIAD_INLINE const typename KV::Other* weights_of(const float* weights, int r) {
  return reinterpret_cast<const typename KV::Other*>(weights + r * kStepTokens);
}

// values[r][d ...] += sum_t weights[r][t] * V[t][d ...], kCount vectors of d.
template <class KV, int kRows, int kCount>
CHILIAD_INLINE void mix_block(const Round& round, const float* weights, int head_dim, int d, float* values) {
  constexpr std::int64_t kStride = kStepTokens * sizeof(float) / sizeof(typename KV::Other);
  Vec sums[kRows][kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sums[r][i] = vload(values + r * head_dim + d + i * kLanes);
  for (int s = 0; s < round.count; ++s) {
    const typename KV::T* from = reinterpret_cast<const typename KV::T*>(round.v[s]) + d * KV::kPair;
    const typename KV::Other* w = weights_of<KV>(weights, 0) + s * kStrip;
    for (int t = 0; t < kStrip; t += KV::kPair, from += head_dim * KV::kPair) {
      typename KV::Vector v[kCount];
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) v[i] = KV::load(from + i * kLanes * KV::kPair);
      KV::template add<kRows, kCount>(w + t, kStride, v, sums);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) vstore(values + r * head_dim + d + i * kLanes, sums[r][i]);
}

template <class KV, int kRows>
void mix_rows(const AttentionCall& call, const Round& round, const float* weights, float* values, Ahead& ahead, int lines) {
  constexpr int kCount = mix_vectors(kRows);
  const int head_dim = call.head_dim;
  int d = 0;
  for (; d + kCount * kLanes <= head_dim; d += kCount * kLanes) {
    ahead.take(lines * kCount * kLanes / head_dim);
    mix_block<KV, kRows, kCount>(round, weights, head_dim, d, values);
  }
  for (; d + kLanes <= head_dim; d += kLanes) mix_block<KV, kRows, 1>(round, weights, head_dim, d, values);
  for (; d < head_dim; ++d)  // the rest of a head_dim that no vector divides
    for (int r = 0; r < kRows; ++r) {
      float sum = values[r * head_dim + d];
      for (int s = 0; s < round.count; ++s) {
        const typename KV::T* v = reinterpret_cast<const typename KV::T*>(round.v[s]) + d * KV::kPair;
        for (int t = 0; t < kStrip; t += KV::kPair, v += head_dim * KV::kPair)
          sum = KV::add(weights_of<KV>(weights, r) + s * kStrip + t, v, sum);
      }
      values[r * head_dim + d] = sum;
    }
}

template <int n>
struct Size {
  static constexpr int value = n;
};

// Cut rows into blocks of at most kBlockRows: body(first row, Size<rows>).
template <class Body>
CHILIAD_INLINE void row_blocks(int rows, const Body& body) {
  int r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) body(r, Size<kBlockRows>{});
  if (r + 4 <= rows) body(r, Size<4>{}), r += 4;
  switch (rows - r) {
    case 3: body(r, Size<3>{}); break;
    case 2: body(r, Size<2>{}); break;
    case 1: body(r, Size<1>{}); break;
    default: break;
  }
}

// The tokens of a round that one row sees: [low, high), counted from the round's first strip.
struct Seen {
  int low, high;
};

CHILIAD_INLINE Seen seen(const AttentionCall& call, int position, const Round& round) {
  const int low = call.window > 0 ? position - call.window + 1 : 0;
  return {most(low - round.start, 0), most(least(position + 1 - round.start, round.count * kStrip), 0)};
}

CHILIAD_INLINE int position_of(const AttentionCall& call, const AttentionTile& tile, int row) {
  return tile.position + (tile.begin + row) / (call.num_heads / call.num_kv_heads);
}

// Hide what the row does not see, by selection: those scores may be anything.
CHILIAD_INLINE void hide(float* scores, Seen see, int tokens) {
  for (int t = 0; t < see.low; ++t) scores[t] = kLowest;
  for (int t = see.high; t < tokens; ++t) scores[t] = kLowest;
}

CHILIAD_INLINE void fade_values(float* values, float fade, int head_dim) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) vstore(values + d, vload(values + d) * vset(fade));
  for (; d < head_dim; ++d) values[d] *= fade;
}

CHILIAD_INLINE const float* query(const AttentionCall& call, const AttentionTile& tile, int head, int flat) {
  const int group = call.num_heads / call.num_kv_heads;
  return call.q + (std::int64_t{tile.row} + flat / group) * call.q_stride + (head * group + flat % group) * call.head_dim;
}

template <class KV>
struct VectorPath {
  using Other = typename KV::Other;
  const AttentionCall& call;
  const AttentionTile& tile;
  const Scratch& at;
  const int rows;

  VectorPath(const AttentionCall& call, const AttentionTile& tile, const Scratch& at)
      : call(call), tile(tile), at(at), rows(tile.end - tile.begin) {
    const float factor = call.scale * kLog2e;
    for (int head = tile.head_begin; head < tile.head_end; ++head)
      for (int r = 0; r < rows; ++r) {
        const float* from = query(call, tile, head, tile.begin + r);
        Other* to = queries(head) + r * padded(call.head_dim);
        for (int d = 0; d < call.head_dim; d += kLanes) {  // beyond head_dim there is room, and nobody looks
          const int n = least(call.head_dim - d, kLanes);
          KV::store(to + d, vload(from + d, n) * vset(factor));
        }
      }
  }

  Other* queries(int head) const {
    return reinterpret_cast<Other*>(at.q + (head - tile.head_begin) * kTileRows * padded(call.head_dim));
  }

  void round(int head, const Round& round, State state, Ahead& ahead, int lines) const {
    const std::int64_t width = padded(call.head_dim);
    const Other* q = queries(head);
    row_blocks(rows, [&](int r, auto size) {
      score_rows<KV, decltype(size)::value>(call, round, q + r * width, at.weights + r * kStepTokens, ahead, r ? 0 : lines);
    });
    ahead.take(lines);
    for (int r = 0; r < rows; ++r)
      soften(at.weights + r * kStepTokens, seen(call, position_of(call, tile, r), round), round.count * kStrip,
             state.maximum + r, state.sums + r * kStrip, state.values + r * call.head_dim);
    ahead.take(lines);
    row_blocks(rows, [&](int r, auto size) {
      mix_rows<KV, decltype(size)::value>(call, round, at.weights + r * kStepTokens, state.values + r * call.head_dim,
                                          ahead, r ? 0 : lines);
    });
  }

  // scores -> weights in place for one row; updates the row's maximum and sums, scales its values.
  void soften(float* scores, Seen see, int tokens, float* maximum, float* sums, float* values) const {
    Other* weights = reinterpret_cast<Other*>(scores);  // as narrow or narrower: written behind the reading
    if (see.low >= see.high) {
      for (int t = 0; t < tokens; t += kLanes) KV::store(weights + t, vset(0.0f));
      return;
    }
    hide(scores, see, tokens);
    Vec peak = vset(kLowest);
    for (int t = 0; t < tokens; t += kLanes) peak = vmax(peak, vload(scores + t));
    const float before = *maximum, top = vtop(peak), now = top > before ? top : before;
    Vec added = vset(0.0f);
    for (int t = 0; t < tokens; t += kLanes) {
      const Vec w = vexp2_below(vload(scores + t) - vset(now));
      KV::store(weights + t, w);
      added = added + w;
    }
    const float fade = before == now ? 1.0f : exp2_below(before - now);
    *maximum = now;
    vstore(sums, vfma(vload(sums), vset(fade), added));
    if (fade != 1.0f) fade_values(values, fade, call.head_dim);
  }
};

// ---- the tile path ----

#if CHILIAD_AMX

// Largest lane of each of 16 vectors, vector i's in lane i.
CHILIAD_INLINE __m512 tops_of(const __m512* x) {
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_max_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(a[2 * i]), high = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_max_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return _mm512_max_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

// 2^x for x <= 0 to 1e-4: three terms are plenty for a weight that is rounded to 8 bits.
CHILIAD_INLINE __m512 coarse_exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 0x08);
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.0550086057f), f, _mm512_set1_ps(0.242211008f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693282967f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, _mm512_sub_ps(x, f));
}

// Tile registers: 0-3 sums, of two blocks of 16 rows by two of 16 columns; 4, 5 the row blocks'
// queries or weights; 6, 7 K or V.
struct TilePath {
  const AttentionCall& call;
  const AttentionTile& tile;
  const Scratch& at;
  const int rows, strips;  // strips: of 16 tokens per V tile, 2, or 1 where pages do not hold whole 32s
  const float factor;
  TileConfig shapes[2];    // for scores; for mixing, if that differs

  static bool takes(const AttentionCall& call) { return call.bfloat16 && call.head_dim % 32 == 0 && call.scale > 0; }

  TilePath(const AttentionCall& call, const AttentionTile& tile, const Scratch& at)
      : call(call), tile(tile), at(at), rows(tile.end - tile.begin), strips(call.span % 32 == 0 ? 2 : 1),
        factor(call.scale * kLog2e) {
    const int first = least(rows, 16), second = rows > 16 ? rows - 16 : first;
    for (int phase = 0; phase < 2; ++phase) {
      const int depth = phase == 0 ? 16 : strips * 8;  // pairs that one tile multiplies
      const int heights[8] = {first, first, second, second, first, second, depth, depth};
      for (int i = 0; i < 8; ++i) {
        shapes[phase].rows[i] = static_cast<std::uint8_t>(heights[i]);
        shapes[phase].row_bytes[i] = static_cast<std::uint16_t>(i == 4 || i == 5 ? depth * 4 : 64);
      }
    }
    configure(0);
    for (int head = tile.head_begin; head < tile.head_end; ++head)
      for (int r = 0; r < rows; ++r) {
        const float* from = query(call, tile, head, tile.begin + r);
        bf16* to = queries(head) + r * call.head_dim;
        for (int d = 0; d < call.head_dim; d += 32) {
          const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + d + 16), _mm512_loadu_ps(from + d));
          _mm512_storeu_si512(to + d, reinterpret_cast<__m512i>(both));
        }
      }
  }
  ~TilePath() { _tile_release(); }

  void configure(int phase) const { configure_tiles(shapes[phase]); }

  bf16* queries(int head) const {
    return reinterpret_cast<bf16*>(at.q + (head - tile.head_begin) * kTileRows * padded(call.head_dim));
  }

  void round(int head, const Round& round, State state, Ahead& ahead, int lines) const {
    if (strips == 1) configure(0);
    rows > 16 ? score<true>(queries(head), round, ahead, lines) : score<false>(queries(head), round, ahead, lines);
    ahead.take(lines);
    soften(round, state);
    ahead.take(lines);
    if (strips == 1) configure(1);
    rows > 16 ? mix<true>(round, state.values, ahead, lines) : mix<false>(round, state.values, ahead, lines);
  }

  template <bool both>  // blocks of 16 rows
  void score(const bf16* q, const Round& round, Ahead& ahead, int lines) const {
    const std::int64_t stride = std::int64_t{call.block_tokens} * 4, q_bytes = std::int64_t{call.head_dim} * 2;
    constexpr std::int64_t kBytes = kStepTokens * 4;
    const bf16* q2 = q + 16 * call.head_dim;
    memory_is_read(q);
    for (int s = 0; s < round.count; s += 2) {
      const bool pair = s + 1 < round.count;
      ahead.take(lines * 2 / kStrips);
      const char *k = round.k[s], *k2 = round.k[pair ? s + 1 : s];
      float *to = at.weights + s * kStrip, *to2 = to + 16 * kStepTokens;
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (both) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int d = 0; d < call.head_dim; d += 32) {
        _tile_loadd(4, q + d, q_bytes);
        _tile_loadd(6, k + d / 2 * stride, stride);
        _tile_dpbf16ps(0, 4, 6);
        if (pair) {
          _tile_loadd(7, k2 + d / 2 * stride, stride);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (both) {
          _tile_loadd(5, q2 + d, q_bytes);
          _tile_dpbf16ps(2, 5, 6);
          if (pair) _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, to, kBytes);
      if (pair) _tile_stored(1, to + kStrip, kBytes);
      if constexpr (both) {
        _tile_stored(2, to2, kBytes);
        if (pair) _tile_stored(3, to2 + kStrip, kBytes);
      }
    }
  }

  // What up to 16 rows of a round need to turn scores into weights.
  struct Rows {
    alignas(64) float maximum[16], fade[16];
    bool blind[16] = {};  // sees none of these tokens
  };

  void survey(int begin, int end, const Round& round, int tokens, State state, Rows& out) const {
    const int first = position_of(call, tile, begin), last = position_of(call, tile, end - 1);
    const bool all = tokens == round.count * kStrip && first + 1 >= round.start + tokens &&
                     (call.window == 0 || last - call.window + 1 <= round.start);
    __m512 peaks[16];
    for (int i = 0; i < 16; ++i) {
      peaks[i] = _mm512_set1_ps(kLowest);
      if (begin + i >= end) continue;
      float* scores = at.weights + (begin + i) * kStepTokens;
      if (!all) {
        const Seen see = seen(call, position_of(call, tile, begin + i), round);
        out.blind[i] = see.low >= see.high;
        if (out.blind[i]) continue;
        hide(scores, see, tokens);
      }
      for (int t = 0; t < tokens; t += 16) peaks[i] = _mm512_max_ps(peaks[i], _mm512_loadu_ps(scores + t));
    }
    const __m512 before = _mm512_loadu_ps(state.maximum + begin);
    const __m512 now = _mm512_max_ps(_mm512_mul_ps(tops_of(peaks), _mm512_set1_ps(factor)), before);
    _mm512_storeu_ps(state.maximum + begin, now);
    _mm512_store_ps(out.maximum, now);
    _mm512_store_ps(out.fade, _mm512_mask_mov_ps(vexp2_below(_mm512_sub_ps(before, now)),
                                                 _mm512_cmp_ps_mask(before, now, _CMP_EQ_OQ), _mm512_set1_ps(1.0f)));
  }

  // Like the other path's, with weights rounded to bfloat16.
  void soften(const Round& round, State state) const {
    const int tokens = (round.count + 1) / 2 * 2 * kStrip;  // a V tile may hold two strips
    Rows surveyed[2];
    for (int begin = 0; begin < rows; begin += 16)
      survey(begin, least(rows, begin + 16), round, tokens, state, surveyed[begin / 16]);
    const __m512 scale = _mm512_set1_ps(factor);
    for (int r = 0; r < rows; ++r) {
      // The tile unit falls asleep after about half a microsecond and takes a quarter to wake up.
      if (r == 8) _tile_dpbf16ps(0, 4, 6);
      const Rows& of = surveyed[r / 16];
      float* scores = at.weights + r * kStepTokens;
      bf16* weights = reinterpret_cast<bf16*>(scores);  // in place, behind the reading
      if (of.blind[r % 16]) {
        for (int t = 0; t < tokens; t += 32) _mm512_storeu_si512(weights + t, _mm512_setzero_si512());
        continue;
      }
      const float fade = of.fade[r % 16];
      const __m512 top = _mm512_set1_ps(of.maximum[r % 16]);
      __m512 added = _mm512_setzero_ps();
      for (int t = 0; t < tokens; t += 32) {
        const __m512 a = coarse_exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + t), scale, top));
        const __m512 b = coarse_exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + t + 16), scale, top));
        added = _mm512_add_ps(_mm512_add_ps(added, a), b);
        _mm512_storeu_si512(weights + t, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
      }
      float* sums = state.sums + r * kStrip;
      _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(fade), added));
      if (fade != 1.0f) fade_values(state.values + r * call.head_dim, fade, call.head_dim);
    }
  }

  template <bool both>
  void mix(const Round& round, float* values, Ahead& ahead, int lines) const {
    const std::int64_t stride = std::int64_t{call.head_dim} * 4;
    constexpr std::int64_t kBytes = kStepTokens * 4;
    const bf16 *w = reinterpret_cast<const bf16*>(at.weights), *w2 = w + 32 * kStepTokens;
    memory_is_read(w);
    for (int d = 0; d < call.head_dim; d += 32) {
      ahead.take(lines * 32 / call.head_dim);
      float *to = values + d, *to2 = to + 16 * call.head_dim;
      _tile_loadd(0, to, stride);
      _tile_loadd(1, to + 16, stride);
      if constexpr (both) {
        _tile_loadd(2, to2, stride);
        _tile_loadd(3, to2 + 16, stride);
      }
      for (int s = 0; s < round.count; s += strips) {
        const char* v = round.v[s] + d * 4;
        _tile_loadd(4, w + s * kStrip, kBytes);
        _tile_loadd(6, v, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, v + 64, stride);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (both) {
          _tile_loadd(5, w2 + s * kStrip, kBytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, to, stride);
      _tile_stored(1, to + 16, stride);
      if constexpr (both) {
        _tile_stored(2, to2, stride);
        _tile_stored(3, to2 + 16, stride);
      }
    }
  }
};

#endif

// ---- items ----

void clear(State state, int rows, int head_dim) {
  for (int r = 0; r < kTileRows; ++r) state.maximum[r] = kLowest;
  __builtin_memset(state.sums, 0, sizeof(float) * rows * kStrip);
  __builtin_memset(state.values, 0, sizeof(float) * rows * head_dim);
}

// total += part: two states of neighbouring parts of the context, the earlier one in total.
void merge_state(State total, const State part, int rows, int head_dim) {
  float a[kTileRows], b[kTileRows];  // what the new maximum makes of either
  for (int r = 0; r < rows; r += kLanes) {
    const Vec before = vload(total.maximum + r), other = vload(part.maximum + r), now = vmax(before, other);
    vstore(a + r, vexp2_below(before - now));
    vstore(b + r, vexp2_below(other - now));
    vstore(total.maximum + r, now);
  }
  for (int r = 0; r < rows; ++r) {
    if (part.maximum[r] == kLowest) continue;  // saw nothing
    const auto add = [&](float* to, const float* from, int size) {
      int d = 0;
      for (; d + kLanes <= size; d += kLanes)
        vstore(to + d, vfma(vload(to + d), vset(a[r]), vload(from + d) * vset(b[r])));
      for (; d < size; ++d) to[d] = __builtin_fmaf(to[d], a[r], from[d] * b[r]);
    };
    add(total.sums + r * kStrip, part.sums + r * kStrip, kLanes);
    add(total.values + r * head_dim, part.values + r * head_dim, head_dim);
  }
}

void write_out(const AttentionCall& call, const AttentionTile& tile, int head, const State state) {
  const int group = call.num_heads / call.num_kv_heads, head_dim = call.head_dim;
  for (int f = tile.begin; f < tile.end; ++f) {
    const int r = f - tile.begin, column = (head * group + f % group) * head_dim, row = tile.row + f / group;
    const float *from = state.values + r * head_dim, scale = 1.0f / vsum(vload(state.sums + r * kStrip));
    int d = 0;
    if (call.out_tiles) {  // whole vectors: column and head_dim are multiples of 32 (see `attention`)
      std::byte* to = call.out_tiles.data + row / kRowTile * call.out_tiles.bytes + row % kRowTile * 64;
      for (; d < head_dim; d += kLanes)
        vstore_bf16(reinterpret_cast<bf16*>(to + (column + d) / 32 * 1024) + (column + d) % 32, vload(from + d) * vset(scale));
      continue;
    }
    float* to = call.out + std::int64_t{row} * call.num_heads * head_dim + column;
    for (; d + kLanes <= head_dim; d += kLanes) vstore(to + d, vload(from + d) * vset(scale));
    for (; d < head_dim; ++d) to[d] = from[d] * scale;
  }
}

template <class Path>
void run_tile(const AttentionCall& call, const AttentionTile& tile, const AttentionTile* next, const Scratch& at,
              float* partial) {
  const Path path(call, tile, at);
  const int group = call.num_heads / call.num_kv_heads, rows = tile.end - tile.begin;
  const int heads = tile.head_end - tile.head_begin;
  const int low = call.window > 0 ? most(tile.position + tile.begin / group - call.window + 1, 0) : 0;
  const int high = tile.position + (tile.end - 1) / group + 1;
  const bool one = tile.last_split - tile.first_split == 1;
  const std::int64_t size = state_floats(call.head_dim);
  const auto total = [&](int head) { return State(at.total + (head - tile.head_begin) * size); };
  const auto state = [&](int head) {
    return State((partial != nullptr ? partial : one ? at.total : at.state) + (head - tile.head_begin) * size);
  };
  Ahead ahead(call, tile, next);
  // Lines to fetch in each quarter of a round. Prefill tiles compute far longer than they load.
  const int lines = rows <= 16 ? ahead.per_round(heads) / 4 + 1 : 0;
  if (!one)
    for (int head = tile.head_begin; head < tile.head_end; ++head) clear(total(head), rows, call.head_dim);
  for (int split = tile.first_split; split < tile.last_split; ++split) {
    for (int head = tile.head_begin; head < tile.head_end; ++head) clear(state(head), rows, call.head_dim);
    const int stop = least(high, (split + 1) * call.split);
    for (int begin = most(split * call.split, low / call.step * call.step); begin < stop; begin += call.step)
      for (int head = tile.head_begin; head < tile.head_end; ++head)
        path.round(head, round_of(call, tile, head, begin, low, high), state(head), ahead, lines);
    if (!one)
      for (int head = tile.head_begin; head < tile.head_end; ++head)
        merge_state(total(head), state(head), rows, call.head_dim);
  }
  if (partial == nullptr)
    for (int head = tile.head_begin; head < tile.head_end; ++head) write_out(call, tile, head, total(head));
}

// Numbers too small to be normal count as zeros: on Intel, an instruction that makes one takes fifty times as long.
struct FlushSmall {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  FlushSmall() { _mm_setcsr(before | 0x8040); }
  ~FlushSmall() { _mm_setcsr(before); }
#endif
};

void tile(const AttentionCall& call, const AttentionTile& tile, const AttentionTile* next, float* scratch, float* partial) {
  const FlushSmall flush;
  const Scratch at(scratch, call.head_dim, call.item_heads);
#if CHILIAD_AMX
  if (TilePath::takes(call)) return run_tile<TilePath>(call, tile, next, at, partial);
#endif
  if (call.bfloat16) return run_tile<VectorPath<BFloat16>>(call, tile, next, at, partial);
  run_tile<VectorPath<Float32>>(call, tile, next, at, partial);
}

void merge(const AttentionCall& call, const AttentionTile& tile, float* scratch, float* partial) {
  const FlushSmall flush;
  const Scratch at(scratch, call.head_dim, call.item_heads);
  const int rows = tile.end - tile.begin, heads = tile.head_end - tile.head_begin;
  const State total(at.total);
  for (int i = 0; i < heads; ++i) {
    clear(total, rows, call.head_dim);
    for (int split = 0; split < tile.last_split - tile.first_split; ++split)
      merge_state(total, State(partial + (split * call.item_heads + i) * state_floats(call.head_dim)), rows, call.head_dim);
    write_out(call, tile, tile.head_begin + i, total);
  }
}

}  // namespace

CHILIAD_EXPORT(AttentionOps, attention_ops) = {scratch_floats, tile, merge};

}  // namespace chiliad
