// Paged attention, one tile at a time. A query row's result depends on its own q and context
// only: the context is walked in rounds of call.step tokens that start at fixed positions, every
// sum runs over tokens (or head_dim) in rising order whatever the tile, a round that a row
// cannot see leaves its state untouched, and tokens masked inside a round add exact zeros.
// After call.split tokens a fresh state starts, and states are merged in order, so that a long
// context may be cut among threads without changing a bit.
//
// The float path keeps q and the softmax weights in float32. With AMX tiles and bfloat16 KV both
// are rounded to bfloat16, and prefill and decode share that path.
#include "attention.h"
#include "lanes.h"
#include "twins.h"

namespace chiliad {
namespace {

constexpr int kStrip = 16;  // tokens: the unit of a score's computation, and never across pages
constexpr int kStrips = kStepTokens / kStrip;
constexpr int kPerStrip = kStrip / kLanes;
constexpr float kLowest = -__builtin_inff();
constexpr float kLog2e = 1.44269504088896341f;

CHILIAD_INLINE int least(int a, int b) { return a < b ? a : b; }
CHILIAD_INLINE int most(int a, int b) { return a > b ? a : b; }

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define CHILIAD_TILES 1
#endif

// Where scratch lies. `weights` are scores first, then softmax weights: [kTileRows, kStepTokens].
struct Scratch {
  float *q, *weights, *state, *total;
  bf16 *q16, *weights16;
  Scratch(float* at, int head_dim) {
    const std::int64_t q_floats = kTileRows * padded(head_dim), weight_floats = kTileRows * kStepTokens;
    q = at;
    weights = q + q_floats;
    state = weights + weight_floats;
    total = state + state_floats(head_dim);
    q16 = reinterpret_cast<bf16*>(total + state_floats(head_dim));
    weights16 = q16 + q_floats;
  }
  static std::int64_t padded(int head_dim) { return (head_dim + 31) / 32 * 32; }
  static std::int64_t floats(int head_dim) {
    return kTileRows * (padded(head_dim) + kStepTokens) * 3 / 2 + 2 * state_floats(head_dim);
  }
};

// The pages of a round: K and V of each strip of 16 tokens.
struct Round {
  const void *k[kStrips], *v[kStrips];
  int first, count;  // strips that some row of the tile sees; k and v start at `first`
};

struct Float32 {
  using T = float;
  static constexpr int kPair = 1;
  static CHILIAD_INLINE void load(const float* p, Vec& a, Vec&) { a = vload(p); }
  static CHILIAD_INLINE void read(const float* p, float& a, float&) { a = *p; }
};

struct BFloat16 {
  using T = bf16;
  static constexpr int kPair = 2;
  static CHILIAD_INLINE void load(const bf16* p, Vec& a, Vec& b) { vload_pairs(p, a, b); }
  static CHILIAD_INLINE void read(const bf16* p, float& a, float& b) {
    a = to_float(p[0]);
    b = to_float(p[1]);
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
inline void score_block(const float* q, int head_dim, std::int64_t width, const void* const* k, int block_tokens,
                        float* scores) {
  constexpr int kVectors = kCount * kPerStrip;
  const typename KV::T* at[kCount];
  for (int s = 0; s < kCount; ++s) at[s] = static_cast<const typename KV::T*>(k[s]);
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sums[r][i] = vset(0.0f);
  std::int64_t offset = 0;
  const std::int64_t stride = std::int64_t{block_tokens} * KV::kPair;
  for (int d = 0; d < head_dim; d += KV::kPair, offset += stride) {
    Vec even[kVectors], odd[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i)
      KV::load(at[i / kPerStrip] + offset + (i % kPerStrip) * kLanes * KV::kPair, even[i], odd[i]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec a = vset(q[r * width + d]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sums[r][i] = vfma(a, even[i], sums[r][i]);
    }
    if constexpr (KV::kPair == 2) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec b = vset(q[r * width + d + 1]);
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) sums[r][i] = vfma(b, odd[i], sums[r][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) vstore(scores + r * kStepTokens + i * kLanes, sums[r][i]);
}

template <class KV, int kRows>
void score_rows(const AttentionCall& call, const Round& round, const float* q, std::int64_t width, float* scores) {
  constexpr int kCount = score_strips(kRows);
  int s = 0;
  for (; s + kCount <= round.count; s += kCount)
    score_block<KV, kRows, kCount>(q, call.head_dim, width, round.k + s, call.block_tokens, scores + s * kStrip);
  if constexpr (kCount > 1)
    for (; s < round.count; ++s)
      score_block<KV, kRows, 1>(q, call.head_dim, width, round.k + s, call.block_tokens, scores + s * kStrip);
}

// values[r][d ...] += sum_t weights[r][t] * V[t][d ...], kCount vectors of d.
template <class KV, int kRows, int kCount>
inline void mix_block(const Round& round, const float* weights, int head_dim, int d, float* values) {
  Vec sums[kRows][kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sums[r][i] = vload(values + r * head_dim + d + i * kLanes);
  for (int s = 0; s < round.count; ++s) {
    const typename KV::T* v = static_cast<const typename KV::T*>(round.v[s]) + d * KV::kPair;
    const float* w = weights + s * kStrip;
    for (int t = 0; t < kStrip; t += KV::kPair, v += head_dim * KV::kPair) {
      Vec even[kCount], odd[kCount];
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) KV::load(v + i * kLanes * KV::kPair, even[i], odd[i]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec a = vset(w[r * kStepTokens + t]);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) sums[r][i] = vfma(a, even[i], sums[r][i]);
      }
      if constexpr (KV::kPair == 2) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vec b = vset(w[r * kStepTokens + t + 1]);
#pragma GCC unroll 8
          for (int i = 0; i < kCount; ++i) sums[r][i] = vfma(b, odd[i], sums[r][i]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) vstore(values + r * head_dim + d + i * kLanes, sums[r][i]);
}

template <class KV, int kRows>
void mix_rows(const AttentionCall& call, const Round& round, const float* weights, float* values) {
  constexpr int kCount = mix_vectors(kRows);
  const int head_dim = call.head_dim;
  int d = 0;
  for (; d + kCount * kLanes <= head_dim; d += kCount * kLanes)
    mix_block<KV, kRows, kCount>(round, weights, head_dim, d, values);
  for (; d + kLanes <= head_dim; d += kLanes) mix_block<KV, kRows, 1>(round, weights, head_dim, d, values);
  for (; d < head_dim; ++d)  // the rest of a head_dim that no vector divides
    for (int r = 0; r < kRows; ++r) {
      float sum = values[r * head_dim + d];
      for (int s = 0; s < round.count; ++s) {
        const typename KV::T* v = static_cast<const typename KV::T*>(round.v[s]) + d * KV::kPair;
        for (int t = 0; t < kStrip; t += KV::kPair, v += head_dim * KV::kPair) {
          float even, odd = 0;
          KV::read(v, even, odd);
          sum = __builtin_fmaf(weights[r * kStepTokens + s * kStrip + t], even, sum);
          if constexpr (KV::kPair == 2)
            sum = __builtin_fmaf(weights[r * kStepTokens + s * kStrip + t + 1], odd, sum);
        }
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

// The strips of tokens [begin, end) that lie in [low, high), the range some row of the tile sees.
inline Round strips_of(const AttentionCall& call, const AttentionTile& tile, int begin, int low, int high) {
  Round round;
  round.first = most(low - begin, 0) / call.span * call.span / kStrip;
  const int last = (least(high - begin, call.step) + kStrip - 1) / kStrip;
  round.count = last - round.first;
  const std::int64_t item = call.bfloat16 ? 2 : 4, pair = call.bfloat16 ? 2 : 1;
  const std::int64_t head = std::int64_t{call.block_tokens} * call.head_dim * item;
  for (int s = 0; s < round.count; ++s) {
    const int token = begin + (round.first + s) * kStrip;
    const std::int64_t offset = token % call.block_tokens;
    const std::uint8_t* page =
        call.arena + tile.table[token / call.block_tokens * call.table_stride] * call.page_bytes + tile.kv_head * head;
    round.k[s] = page + offset * pair * item;
    round.v[s] = page + call.num_kv_heads * head + offset * call.head_dim * item;
  }
  return round;
}

// The tokens of a round that one row sees: [low, high), counted from the round's first strip.
struct Seen {
  int low, high;
};

inline Seen seen(const AttentionCall& call, int position, int begin, const Round& round) {
  const int low = call.window > 0 ? position - call.window + 1 : 0, start = begin + round.first * kStrip;
  return {most(low - start, 0), most(least(position + 1 - start, round.count * kStrip), 0)};
}

// scores -> weights in place for one row; updates the row's maximum and sum, scales its values.
inline void soften(float* scores, Seen see, int count, float* maximum, float* sum_of, float* values, int head_dim) {
  const int tokens = count * kStrip;
  if (see.low >= see.high) {
    for (int t = 0; t < tokens; t += kLanes) vstore(scores + t, vset(0.0f));
    return;
  }
  for (int t = 0; t < see.low; ++t) scores[t] = kLowest;
  for (int t = see.high; t < tokens; ++t) scores[t] = kLowest;
  Vec peak = vset(kLowest);
  for (int t = 0; t < tokens; t += kLanes) peak = vmax(peak, vload(scores + t));
  const float before = *maximum, now = __builtin_fmaxf(before, vtop(peak));
  Vec added = vset(0.0f);
  for (int t = 0; t < tokens; t += kLanes) {
    const Vec w = vexp2_below(vload(scores + t) - vset(now));
    vstore(scores + t, w);
    added = added + w;
  }
  const float fade = before == now ? 1.0f : exp2_below(before - now);
  *maximum = now;
  *sum_of = __builtin_fmaf(*sum_of, fade, vsum(added));
  if (fade != 1.0f) {
    int d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) vstore(values + d, vload(values + d) * vset(fade));
    for (; d < head_dim; ++d) values[d] *= fade;
  }
}

struct State {
  float *maximum, *sum, *values;
  State(float* at) : maximum(at), sum(at + kTileRows), values(at + 2 * kTileRows) {}
};

inline void clear(State state, int rows, int head_dim) {
  for (int r = 0; r < rows; ++r) state.maximum[r] = kLowest, state.sum[r] = 0;
  __builtin_memset(state.values, 0, sizeof(float) * rows * head_dim);
}

// total += part: two states of neighbouring parts of the context, the earlier one in total.
inline void merge_state(State total, const State part, int rows, int head_dim) {
  for (int r = 0; r < rows; ++r) {
    if (part.sum[r] == 0) continue;  // saw nothing
    const float now = __builtin_fmaxf(total.maximum[r], part.maximum[r]);
    const float a = exp2_below(total.maximum[r] - now), b = exp2_below(part.maximum[r] - now);
    total.maximum[r] = now;
    total.sum[r] = __builtin_fmaf(total.sum[r], a, part.sum[r] * b);
    float* to = total.values + r * head_dim;
    const float* from = part.values + r * head_dim;
    int d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) vstore(to + d, vfma(vload(to + d), vset(a), vload(from + d) * vset(b)));
    for (; d < head_dim; ++d) to[d] = __builtin_fmaf(to[d], a, from[d] * b);
  }
}

inline void write_out(const AttentionCall& call, const AttentionTile& tile, const State state) {
  const int group = call.num_heads / call.num_kv_heads, head_dim = call.head_dim;
  for (int f = tile.begin; f < tile.end; ++f) {
    const int r = f - tile.begin, head = tile.kv_head * group + f % group;
    float* to = call.out + (std::int64_t{tile.row} + f / group) * call.num_heads * head_dim + head * head_dim;
    const float* from = state.values + r * head_dim;
    const float scale = 1.0f / state.sum[r];
    int d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) vstore(to + d, vload(from + d) * vset(scale));
    for (; d < head_dim; ++d) to[d] = from[d] * scale;
  }
}

inline const float* query(const AttentionCall& call, const AttentionTile& tile, int flat) {
  const int group = call.num_heads / call.num_kv_heads;
  return call.q + (std::int64_t{tile.row} + flat / group) * call.q_stride +
         (tile.kv_head * group + flat % group) * call.head_dim;
}

// Ask for the next round's pages while this one is computed: blocks lie anywhere in the arena, and
// the hardware's own prefetching stops at each 4 KB.
inline void prefetch(const AttentionCall& call, const Round& round) {
  const int lines = call.head_dim / (call.bfloat16 ? 2 : 1);
  const std::int64_t stride = std::int64_t{call.block_tokens} * 4;
  for (int s = 0; s < round.count; ++s) {
    const char *k = static_cast<const char*>(round.k[s]), *v = static_cast<const char*>(round.v[s]);
    for (int i = 0; i < lines; ++i) {
      __builtin_prefetch(k + i * stride, 0, 2);
      __builtin_prefetch(v + i * 64, 0, 2);
    }
  }
}

// The arithmetic of one path over one tile: load queries, then rounds.
template <class KV>
struct FloatPath {
  const AttentionCall& call;
  const AttentionTile& tile;
  const Scratch& at;
  int rows;
  std::int64_t width;

  FloatPath(const AttentionCall& call, const AttentionTile& tile, const Scratch& at)
      : call(call), tile(tile), at(at), rows(tile.end - tile.begin), width(Scratch::padded(call.head_dim)) {
    const float factor = call.scale * kLog2e;
    for (int r = 0; r < rows; ++r) {
      const float* q = query(call, tile, tile.begin + r);
      for (int d = 0; d < call.head_dim; ++d) at.q[r * width + d] = q[d] * factor;
    }
  }

  void round(const Round& round, int begin, State state) const {
    const int group = call.num_heads / call.num_kv_heads;
    row_blocks(rows, [&](int r, auto size) {
      score_rows<KV, decltype(size)::value>(call, round, at.q + r * width, width, at.weights + r * kStepTokens);
    });
    for (int r = 0; r < rows; ++r) {
      const int position = tile.position + (tile.begin + r) / group;
      soften(at.weights + r * kStepTokens, seen(call, position, begin, round), round.count, state.maximum + r,
             state.sum + r, state.values + r * call.head_dim, call.head_dim);
    }
    row_blocks(rows, [&](int r, auto size) {
      mix_rows<KV, decltype(size)::value>(call, round, at.weights + r * kStepTokens,
                                          state.values + r * call.head_dim);
    });
  }
};

#if CHILIAD_TILES

// Tile registers: 0, 1 sums; 2, 3 queries; 4 K; 5, 6 weights; 7 V.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// The tile intrinsics of gcc 12 do not say that they read memory.
CHILIAD_INLINE void memory_is_read(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

struct TilePath {
  const AttentionCall& call;
  const AttentionTile& tile;
  const Scratch& at;
  int rows, halves;  // halves: blocks of 16 rows
  int tokens;        // per V tile: 32, or 16 where pages do not hold whole 32s
  float factor;

  static bool takes(const AttentionCall& call) { return call.bfloat16 && call.head_dim % 32 == 0 && call.scale > 0; }

  TilePath(const AttentionCall& call, const AttentionTile& tile, const Scratch& at)
      : call(call), tile(tile), at(at), rows(tile.end - tile.begin), halves(rows > 16 ? 2 : 1),
        tokens(call.span % 32 == 0 ? 32 : 16), factor(call.scale * kLog2e) {
    TileShapes shapes;
    const int first = least(rows, 16), second = halves == 2 ? rows - 16 : first;
    const int heights[8] = {first, second, first, second, 16, first, second, tokens / 2};
    for (int i = 0; i < 8; ++i) {
      shapes.rows[i] = static_cast<std::uint8_t>(heights[i]);
      shapes.row_bytes[i] = static_cast<std::uint16_t>(i == 5 || i == 6 ? tokens * 2 : 64);
    }
    memory_is_read(&shapes);
    _tile_loadconfig(&shapes);
    for (int r = 0; r < rows; ++r) {
      const float* q = query(call, tile, tile.begin + r);
      bf16* to = at.q16 + r * call.head_dim;
      for (int d = 0; d < call.head_dim; d += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(q + d))));
    }
  }

  ~TilePath() { _tile_release(); }

  void score(const Round& round) const {
    const std::int64_t stride = std::int64_t{call.block_tokens} * 4, q_bytes = std::int64_t{call.head_dim} * 2;
    const bf16* q = at.q16;
    float* to = at.weights;
    memory_is_read(q);
    if (halves == 2) {
      for (int s = 0; s < round.count; ++s) {
        const char* k = static_cast<const char*>(round.k[s]);
        _tile_zero(0);
        _tile_zero(1);
        for (int d = 0; d < call.head_dim; d += 32) {
          _tile_loadd(4, k + d / 2 * stride, stride);
          _tile_loadd(2, q + d, q_bytes);
          _tile_dpbf16ps(0, 2, 4);
          _tile_loadd(3, q + 16 * call.head_dim + d, q_bytes);
          _tile_dpbf16ps(1, 3, 4);
        }
        _tile_stored(0, to + s * kStrip, kStepTokens * 4);
        _tile_stored(1, to + 16 * kStepTokens + s * kStrip, kStepTokens * 4);
      }
    } else {
      for (int s = 0; s < round.count; ++s) {
        const char* k = static_cast<const char*>(round.k[s]);
        _tile_zero(0);
        for (int d = 0; d < call.head_dim; d += 32) {
          _tile_loadd(4, k + d / 2 * stride, stride);
          _tile_loadd(2, q + d, q_bytes);
          _tile_dpbf16ps(0, 2, 4);
        }
        _tile_stored(0, to + s * kStrip, kStepTokens * 4);
      }
    }
  }

  // Like the float path's soften, with weights rounded to bfloat16 for the tiles.
  void soften_row(float* scores, bf16* weights, Seen see, int count, float* maximum, float* sum_of,
                  float* values) const {
    const int tokens = count * kStrip, padded = (count + 1) / 2 * 2 * kStrip;
    if (see.low >= see.high) {
      __builtin_memset(weights, 0, padded * 2);
      return;
    }
    for (int t = 0; t < see.low; ++t) scores[t] = kLowest;
    for (int t = see.high; t < padded; ++t) scores[t] = kLowest;
    __m512 peak = _mm512_set1_ps(kLowest);
    for (int t = 0; t < tokens; t += 16) peak = _mm512_max_ps(peak, _mm512_loadu_ps(scores + t));
    const float before = *maximum, now = __builtin_fmaxf(before, _mm512_reduce_max_ps(peak) * factor);
    const __m512 scale = _mm512_set1_ps(factor), shift = _mm512_set1_ps(-now);
    __m512 added = _mm512_setzero_ps();
    for (int t = 0; t < padded; t += 16) {
      // 2^x, x <= 0, to 1e-4: three terms are plenty for a weight that is rounded to 8 bits
      const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(scores + t), scale, shift);
      const __m512 f = _mm512_reduce_ps(x, 0x08);
      __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.0550086057f), f, _mm512_set1_ps(0.242211008f));
      y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693282967f));
      y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
      y = _mm512_scalef_ps(y, _mm512_sub_ps(x, f));
      added = _mm512_add_ps(added, y);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + t), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
    }
    const float fade = before == now ? 1.0f : exp2_below(before - now);
    *maximum = now;
    *sum_of = __builtin_fmaf(*sum_of, fade, _mm512_reduce_add_ps(added));
    if (fade != 1.0f)
      for (int d = 0; d < call.head_dim; d += 16)
        _mm512_storeu_ps(values + d, _mm512_mul_ps(_mm512_loadu_ps(values + d), _mm512_set1_ps(fade)));
  }

  void mix(const Round& round, float* values) const {
    const std::int64_t stride = std::int64_t{call.head_dim} * 4, weight_bytes = kStepTokens * 2;
    const bf16* w = at.weights16;
    const int strips = tokens / kStrip;
    memory_is_read(w);
    for (int d = 0; d < call.head_dim; d += 16) {
      _tile_loadd(0, values + d, stride);
      if (halves == 2) {
        _tile_loadd(1, values + 16 * call.head_dim + d, stride);
        for (int s = 0; s < round.count; s += strips) {
          _tile_loadd(7, static_cast<const char*>(round.v[s]) + d * 4, stride);
          _tile_loadd(5, w + s * kStrip, weight_bytes);
          _tile_dpbf16ps(0, 5, 7);
          _tile_loadd(6, w + 16 * kStepTokens + s * kStrip, weight_bytes);
          _tile_dpbf16ps(1, 6, 7);
        }
        _tile_stored(1, values + 16 * call.head_dim + d, stride);
      } else {
        for (int s = 0; s < round.count; s += strips) {
          _tile_loadd(7, static_cast<const char*>(round.v[s]) + d * 4, stride);
          _tile_loadd(5, w + s * kStrip, weight_bytes);
          _tile_dpbf16ps(0, 5, 7);
        }
      }
      _tile_stored(0, values + d, stride);
    }
  }

  void round(const Round& round, int begin, State state) const {
    const int group = call.num_heads / call.num_kv_heads;
    score(round);
    for (int r = 0; r < rows; ++r) {
      const int position = tile.position + (tile.begin + r) / group;
      soften_row(at.weights + r * kStepTokens, at.weights16 + r * kStepTokens, seen(call, position, begin, round),
                 round.count, state.maximum + r, state.sum + r, state.values + r * call.head_dim);
    }
    mix(round, state.values);
  }
};

#endif

template <class Path>
void run_tile(const AttentionCall& call, const AttentionTile& tile, const Scratch& at, float* partial) {
  const Path path(call, tile, at);
  const int group = call.num_heads / call.num_kv_heads, rows = tile.end - tile.begin;
  const int first_position = tile.position + tile.begin / group;
  const int low = call.window > 0 ? most(first_position - call.window + 1, 0) : 0;
  const int high = tile.position + (tile.end - 1) / group + 1;
  const bool one = tile.last_split - tile.first_split == 1;
  const State total(at.total);
  if (partial == nullptr && !one) clear(total, rows, call.head_dim);
  for (int split = tile.first_split; split < tile.last_split; ++split) {
    const State state(partial != nullptr ? partial + (split - tile.first_split) * state_floats(call.head_dim)
                      : one              ? at.total
                                         : at.state);
    clear(state, rows, call.head_dim);
    const int stop = least(high, (split + 1) * call.split);
    int begin = most(split * call.split, low / call.step * call.step);
    if (begin < stop) {
      Round now = strips_of(call, tile, begin, low, high);
      for (; begin < stop; begin += call.step) {
        Round next;
        if (begin + call.step < stop) {
          next = strips_of(call, tile, begin + call.step, low, high);
          if (rows <= 16) prefetch(call, next);
        }
        path.round(now, begin, state);
        now = next;
      }
    }
    if (partial == nullptr && !one) merge_state(total, state, rows, call.head_dim);
  }
  if (partial == nullptr) write_out(call, tile, total);
}

void tile(const AttentionCall& call, const AttentionTile& tile, float* scratch, float* partial) {
  const Scratch at(scratch, call.head_dim);
#if CHILIAD_TILES
  if (TilePath::takes(call)) return run_tile<TilePath>(call, tile, at, partial);
#endif
  if (call.bfloat16) return run_tile<FloatPath<BFloat16>>(call, tile, at, partial);
  run_tile<FloatPath<Float32>>(call, tile, at, partial);
}

void merge(const AttentionCall& call, const AttentionTile& tile, float* scratch, const float* partial) {
  const Scratch at(scratch, call.head_dim);
  const int rows = tile.end - tile.begin;
  const State total(at.total);
  clear(total, rows, call.head_dim);
  for (int split = tile.first_split; split < tile.last_split; ++split)
    merge_state(total, State(const_cast<float*>(partial) + (split - tile.first_split) * state_floats(call.head_dim)),
                rows, call.head_dim);
  write_out(call, tile, total);
}

}  // namespace

extern const AttentionOps CHILIAD_TWIN(attention_ops) = {Scratch::floats, tile, merge};

}  // namespace chiliad
