// The products of phase 2: rows of input times a panel of weights.
#pragma once

#include "linear_quantized.inl"

namespace chiliad {
namespace {

// ---- phase 2: panels ----

// c[R][32] = a[R][K] * panel; float32. Rows of c are kStride apart. Each output is a sum of sums over
// kSum neighbours of k: fixed boundaries keep rows independent, short sums keep the rounding error
// of a long dot product near that of a pairwise one.
template <int R>
void gemm_f32(const float* a, std::size_t lda, const float* b, int k_count, float* c) {
  constexpr int V = 2 * kVecs, kSum = 64;
  for (int first = 0; first < k_count; first += kSum) {
    const int stop = first + kSum < k_count ? first + kSum : k_count;
    Vec sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] = vset(0.0f);
    for (int k = first; k < stop; ++k, b += kPanel) {
      Vec row[R];
      for (int r = 0; r < R; ++r) row[r] = vset(a[r * lda + k]);
      for (int v = 0; v < V; ++v) {
        const Vec w = vload(b + v * kLanes);
        for (int r = 0; r < R; ++r) sum[r][v] = vfma(row[r], w, sum[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        float* to = c + r * kStride + v * kLanes;
        vstore(to, first ? vload(to) + sum[r][v] : sum[r][v]);
      }
  }
}

// The same for bfloat16 weights in pairs of k.
#if defined(__AVX512BF16__)

// A stretch of k small enough that its weights (24 KB) stay in the L1 cache for all rows.
constexpr int kStretch = 12;  // tiles of 32
// How far one pass alone fetches ahead, in bytes; measured: 6 to 8 KB are equal, 4 and 24 are worse,
// and a single row is best left to the hardware's own prefetcher.
constexpr int kNear = 6144;

// c[R][32] (+)= R rows of an input tile times `count` weight tiles. Lines: cache lines of the next
// stretch that are fetched per two steps; all passes over a stretch together fetch all of it, so
// that memory is asked evenly. Rank: rank rows are fetched as well, 8 lines per tile, from these places.
template <int R, int Lines, bool Rank>
void multiply(const std::byte* a, const std::byte* b, int count, bool add, const std::byte* next,
              const std::byte* const* rank, float* c) {
  __m512 sum[R][2];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) sum[r][v] = add ? vload(c + r * kStride + v * kLanes) : _mm512_setzero_ps();
  for (int k = 0; k < count; ++k, a += 1024, b += 2048)
    for (int i = 0; i < 16; i += 2) {
      for (int j = i; j < i + 2; ++j) {
        const __m512bh w0 = (__m512bh)_mm512_load_si512(b + j * 64);
        const __m512bh w1 = (__m512bh)_mm512_load_si512(b + 1024 + j * 64);
        for (int r = 0; r < R; ++r) {
          int pair;
          std::memcpy(&pair, a + r * 64 + j * 4, 4);
          const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, w0);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, w1);
        }
      }
      for (int line = 0; line < Lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
      if (Rank) _mm_prefetch(rank[k] + 32 * i, _MM_HINT_T1);
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) vstore(c + r * kStride + v * kLanes, sum[r][v]);
}

// c[rows][32] = up to 32 rows (two input tiles) times a panel, a stretch of k at a time.
void gemm_bf16(const std::byte* const* tiles, const std::byte* panel, int rows, int k_padded, bool fetch, Lookahead& rank, float* c) {
  constexpr int kMost = 8;
  const std::byte* rank_rows[kStretch];
  const int passes = (rows + kMost - 1) / kMost;
  // equal stretches, lest a short one fetch too little of a long one that follows
  const int steps = k_padded / 32, stretches = (steps + kStretch - 1) / kStretch, stretch = (steps + stretches - 1) / stretches;
  for (int k = 0; k < steps; k += stretch) {
    const int count = steps - k < stretch ? steps - k : stretch;
    const std::byte *b = panel + k * 2048, *next = b + count * 2048;
    for (int r = 0, pass = 0; r < rows; ++pass) {
      const std::byte* a = tiles[r / kRowTile] + k * 1024 + r % kRowTile * 64;
      float* to = c + r * kStride;
      const bool some = rank && rank.chunks(count, b, rank_rows);
      auto choose = [&]<int R, bool Rank>() {
        if (!fetch || (passes == 3 && pass == 2)) return multiply<R, 0, Rank>(a, b, count, k > 0, next, rank_rows, to);
        if (passes == 1) return multiply<R, R == 1 ? 0 : 4, Rank>(a, b, count, k > 0, b + kNear, rank_rows, to);
        if (passes <= 3) return multiply<R, 2, Rank>(a, b, count, k > 0, next + pass * count * 1024, rank_rows, to);
        multiply<R, 1, Rank>(a, b, count, k > 0, next + pass * count * 512, rank_rows, to);
      };
      auto call = [&]<int R>() {
        if (some) choose.template operator()<R, true>();
        else choose.template operator()<R, false>();
      };
      const int left_rows = rows - r;
      if (left_rows >= 8) call.template operator()<8>(), r += 8;
      else if (left_rows >= 4) call.template operator()<4>(), r += 4;
      else if (left_rows >= 2) call.template operator()<2>(), r += 2;
      else call.template operator()<1>(), r += 1;
    }
  }
}

#else

// The even and odd element of each pair, as floats.
#if defined(__AVX512F__)
CHILIAD_INLINE void load_pairs(const bf16* p, Vec& even, Vec& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
#elif defined(__AVX2__)
CHILIAD_INLINE void load_pairs(const bf16* p, Vec& even, Vec& odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
#else
CHILIAD_INLINE void load_pairs(const bf16* p, Vec& even, Vec& odd) {
  for (int i = 0; i < kLanes; ++i) {
    even[i] = to_float(p[2 * i]);
    odd[i] = to_float(p[2 * i + 1]);
  }
}
#endif

template <int R>
void gemm_bf16(const std::byte* tile, const std::byte* panel, int k_padded, float* c) {
  constexpr int V = 2 * kVecs;
  const float* a = reinterpret_cast<const float*>(tile);
  const bf16* b = reinterpret_cast<const bf16*>(panel);
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = vset(0.0f);
  for (int k = 0; k < k_padded; k += 2) {
    // pair k/2 of each block: [k / 32][block][16 pairs][16 columns][2]
    const bf16* pairs = b + k / 32 * 1024 + k % 32 * 16;
    for (int v = 0; v < V; ++v) {
      Vec even, odd;
      load_pairs(pairs + v / kVecs * 512 + v % kVecs * 2 * kLanes, even, odd);
      for (int r = 0; r < R; ++r) {
        const float* row = a + static_cast<std::size_t>(r) * k_padded + k;
        sum[r][v] = vfma(vset(row[0]), even, sum[r][v]);
        sum[r][v] = vfma(vset(row[1]), odd, sum[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) vstore(c + r * kStride + v * kLanes, sum[r][v]);
}

#endif

#if CHILIAD_AMX

// While it lives, this thread has tiles. Numbers too small to be normal count as zeros in them, so they do everywhere.
class Tiling {
 public:
  Tiling() : before_(_mm_getcsr()) {
    configure_tiles({});
    _mm_setcsr(before_ | 0x8040);
  }
  ~Tiling() {
    _mm_setcsr(before_);
    _tile_release();
  }

 private:
  unsigned before_;
};

// A quarter of the pair of weight tiles that comes a little later. Spread between the tile instructions, because a bunch
// of prefetches would fill the load buffers and stall.
CHILIAD_INLINE void fetch(const std::byte* b, int quarter) {
  constexpr int kAhead = 3072;  // bytes, measured: from 4 KB on it is a quarter slower
  for (int line = 0; line < 512; line += 64) _mm_prefetch(b + kAhead + quarter * 512 + line, _MM_HINT_T1);
}

// Up to 32 rows: c[32][32] = tiles (a0, a1) * panel, which comes from memory and is not needed again.
template <bool Two>
void gemm_amx(const std::byte* a0, const std::byte* a1, const std::byte* b, int k_padded, float* c) {
  _tile_zero(0);
  _tile_zero(1);
  if (Two) _tile_zero(2);
  if (Two) _tile_zero(3);
  for (int k = 0; k < k_padded; k += 32, a0 += 1024, a1 += 1024, b += 2048) {
    _tile_loadd(4, a0, 64);
    _tile_stream_loadd(6, b, 64);
    fetch(b, 0);
    _tile_dpbf16ps(0, 4, 6);
    fetch(b, 1);
    _tile_stream_loadd(7, b + 1024, 64);
    _tile_dpbf16ps(1, 4, 7);
    fetch(b, 2);
    if (Two) _tile_loadd(5, a1, 64);
    if (Two) _tile_dpbf16ps(2, 5, 6);
    fetch(b, 3);
    if (Two) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kStride * 4);
  _tile_stored(1, c + 16, kStride * 4);
  if (Two) _tile_stored(2, c + 16 * kStride, kStride * 4);
  if (Two) _tile_stored(3, c + 16 * kStride + 16, kStride * 4);
}

// The same with weights to unpack: multiply step k - 2 while step k is unpacked, so that neither
// memory nor the tile unit waits.
template <bool Two>
void gemm_amx_unpack(DType dtype, const std::byte* a0, const std::byte* a1, const std::byte* panel, std::byte* room,
                     int k_padded, float* c) {
  constexpr int kLag = 2, kMask = 3;
  const int steps = k_padded / 32;
  _tile_zero(0);
  _tile_zero(1);
  if (Two) _tile_zero(2);
  if (Two) _tile_zero(3);
  for (int k = 0; k < steps + kLag; ++k) {
    if (k < steps) unpack_pair(dtype, panel, k, room + (k & kMask) * 2048);
    if (k < kLag) continue;
    const std::byte* b = room + ((k - kLag) & kMask) * 2048;
    memory_is_read(b);
    _tile_loadd(4, a0, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 1024, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (Two) _tile_loadd(5, a1, 64);
    if (Two) _tile_dpbf16ps(2, 5, 6);
    if (Two) _tile_dpbf16ps(3, 5, 7);
    a0 += 1024;
    a1 += 1024;
  }
  _tile_stored(0, c, kStride * 4);
  _tile_stored(1, c + 16, kStride * 4);
  if (Two) _tile_stored(2, c + 16 * kStride, kStride * 4);
  if (Two) _tile_stored(3, c + 16 * kStride + 16, kStride * 4);
}

#else

struct Tiling {};

#endif

// c[rows][32] for up to 16 rows of one input tile.
void gemm_tile(const ProjectPlan& plan, const std::byte* tile, const std::byte* panel, int rows, float* c) {
  const bool f32 = plan.dtype == DType::float32;
  const float* a = reinterpret_cast<const float*>(tile);
  const float* b = reinterpret_cast<const float*>(panel);
  const std::size_t lda = f32 ? plan.in_features : plan.k_padded;
  auto pass = [&]<int R>(int r) {
    if (f32)
      gemm_f32<R>(a + r * lda, lda, b, plan.in_features, c + r * kStride);
#if !defined(__AVX512BF16__)
    else
      gemm_bf16<R>(tile + r * lda * 4, panel, plan.k_padded, c + r * kStride);
#endif
  };
  int r = 0;
  for (; r + kRows <= rows; r += kRows) pass.template operator()<kRows>(r);
  if constexpr (kRows > 4)
    for (; r + 4 <= rows; r += 4) pass.template operator()<4>(r);
  if constexpr (kRows > 2)
    for (; r + 2 <= rows; r += 2) pass.template operator()<2>(r);
  for (; r < rows; ++r) pass.template operator()<1>(r);
}

// How a panel reaches the GEMM.
enum class Source {
  memory,  // as it is multiplied, for the first time: fetch ahead
  cache,   // as it is multiplied
  packed,  // int8 or int4 to unpack; without tiles the unpacked panel is left in `room`
};

// c[rows][32] for up to 32 rows from `row` (a multiple of 16), with the inputs of projection p.
void gemm(const ProjectPlan& plan, int p, int row, int rows, const std::byte* panel, Source source, std::byte* room, [[maybe_unused]] Lookahead& rank, float* c) {
  const int row_tiles = (plan.rows + kRowTile - 1) / kRowTile;
  const std::byte* const* tiles = plan.tiles + p * row_tiles + row / kRowTile;
#if CHILIAD_AMX
  if (plan.parts) return gemm_parts(plan, panel, rows, source == Source::packed, c);
  if (plan.dtype != DType::float32) {
    const bool two = rows > kRowTile;
    if (source == Source::packed)
      return two ? gemm_amx_unpack<true>(plan.dtype, tiles[0], tiles[1], panel, room, plan.k_padded, c)
                 : gemm_amx_unpack<false>(plan.dtype, tiles[0], tiles[0], panel, room, plan.k_padded, c);
    return two ? gemm_amx<true>(tiles[0], tiles[1], panel, plan.k_padded, c)
               : gemm_amx<false>(tiles[0], tiles[0], panel, plan.k_padded, c);
  }
#endif
#if defined(__AVX512BF16__) && !CHILIAD_AMX
  if (quantized(plan.dtype)) return gemm_levels(plan, tiles, panel, rows, source == Source::memory, rank, c);
#endif
  if (source == Source::packed) {
    for (int step = 0; step < plan.k_padded / 32; ++step) unpack_pair(plan.dtype, panel, step, room + step * 2048);
    panel = room;
  }
#if defined(__AVX512BF16__)
  if (plan.dtype != DType::float32) return gemm_bf16(tiles, panel, rows, plan.k_padded, source == Source::memory, rank, c);
#endif
  gemm_tile(plan, tiles[0], panel, rows < kRowTile ? rows : kRowTile, c);
  if (rows > kRowTile) gemm_tile(plan, tiles[1], panel, rows - kRowTile, c + kRowTile * kStride);
}

}  // namespace
}  // namespace chiliad
