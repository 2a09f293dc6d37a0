// Products with int8 and int4 weights: whole levels, and for every column and group of 32 k a scale
// d (int4: and a minimum m), weight = d * level + m. Three ways:
//
//   levels   y += d * (levels . x) + m * sum(x), group by group, on the packed levels. Levels are
//            exact as bfloat16, so the weights are exactly what is stored. Unpacking is a table
//            look-up in registers, once per kRows rows.
//   parts    The same in whole numbers, for a few rows with AMX, where pairs of bfloat16 are multiplied slowly
//            outside of tiles: inputs, as tiles have them, become 16 bits of each group's largest, in two parts of
//            8 bits that VPDPBUSD multiplies with levels.
//   unpacked The panel becomes bfloat16, d * level + m rounded, and serves as such. This is for
//            AMX, whose tiles cannot be scaled between groups, and where bfloat16 is not
//            multiplied anyway.
#pragma once

#include "linear_ahead.inl"

namespace chiliad {
namespace {

#if defined(__AVX512BF16__) && !CHILIAD_AMX
constexpr bool kLevels = true;
#else
constexpr bool kLevels = false;
#endif

CHILIAD_INLINE bool quantized(DType dtype) { return dtype == DType::int8 || dtype == DType::int4; }

// ---- unpacked ----

#if defined(__AVX512F__)

// One tile row: the even and the odd k of 16 columns.
CHILIAD_INLINE void store_pairs(bf16* to, __m512 even, __m512 odd) {
#if defined(__AVX512BF16__)
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_store_si512(to, _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
#else
  auto rounded = [](__m512 x) {  // in the upper half
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    return _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  };
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  _mm512_store_si512(to, _mm512_ternarylogic_epi32(upper, rounded(odd), _mm512_srli_epi32(rounded(even), 16), 0xea));
#endif
}

CHILIAD_INLINE __m512 load_halves(const std::byte* from) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(from)));
}

CHILIAD_INLINE void unpack_int4(const std::byte* from, const std::byte* scales, bf16* to) {
  const __m512 levels = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 d = load_halves(scales), m = load_halves(scales + 64);
  auto weight = [&](__m512i indices) {  // of which the look-up sees 4 bits
    return _mm512_fmadd_ps(_mm512_permutexvar_ps(indices, levels), d, m);
  };
  for (int j = 0; j < 4; ++j) {
    const __m512i words = _mm512_load_si512(from + j * 64);
    for (int s = 0; s < 4; ++s, to += 32)
      store_pairs(to, weight(_mm512_srli_epi32(words, 4 * s)), weight(_mm512_srli_epi32(words, 16 + 4 * s)));
  }
}

CHILIAD_INLINE void unpack_int8(const std::byte* from, const std::byte* scales, bf16* to) {
  const __m512 d = load_halves(scales);
  auto weight = [&](__m512i upper) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(upper, 24)) * d; };
  for (int j = 0; j < 8; ++j) {
    const __m512i bytes = _mm512_load_si512(from + j * 64);
    for (const __m512i pairs : {_mm512_unpacklo_epi8(bytes, bytes), _mm512_unpackhi_epi8(bytes, bytes)}) {
      store_pairs(to, weight(_mm512_slli_epi32(pairs, 16)), weight(pairs));
      to += 32;
    }
  }
}

#else

CHILIAD_INLINE float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = std::uint32_t{h & 0x8000u} << 16, magnitude = h & 0x7fffu;
  if (magnitude < 0x400) {  // subnormal: a multiple of 2^-24
    const float y = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign ? -y : y;
  }
  const std::uint32_t bits = sign | ((magnitude << 13) + 0x38000000u);
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// For each of the 32 elements of a tile row (16 columns, even and odd k).
CHILIAD_INLINE void load_halves(const std::byte* from, float* to) {
  for (int n = 0; n < 16; ++n) {
    std::uint16_t h;
    std::memcpy(&h, from + 2 * n, 2);
    to[2 * n] = to[2 * n + 1] = half_to_float(h);
  }
}

void unpack_int4(const std::byte* from, const std::byte* scales, bf16* to) {
  float d[32], m[32];
  load_halves(scales, d);
  load_halves(scales + 64, m);
  for (int j = 0; j < 4; ++j)
    for (int s = 0; s < 4; ++s, to += 32) {
      std::int8_t level[32];
      for (int e = 0; e < 32; ++e) {
        std::uint16_t word;
        std::memcpy(&word, from + j * 64 + 2 * e, 2);
        level[e] = static_cast<std::int8_t>(word >> (4 * s) & 15);
      }
      for (int e = 0; e < 32; e += kLanes) vstore_bf16(to + e, vfma(vload(level + e), vload(d + e), vload(m + e)));
    }
}

void unpack_int8(const std::byte* from, const std::byte* scales, bf16* to) {
  float d[32];
  load_halves(scales, d);
  const auto* p = reinterpret_cast<const std::int8_t*>(from);
  for (int i = 0; i < 16; ++i, to += 32)
    for (int e = 0; e < 32; e += kLanes)  // runs of 8 bytes of two pairs alternate
      vstore_bf16(to + e, vload(p + i / 2 * 64 + e / 8 * 16 + i % 2 * 8 + e % 8) * vload(d + e));
}

#endif

// Group `step` of a panel becomes two bfloat16 tiles. What is needed a little later is fetched.
CHILIAD_INLINE void unpack_pair(DType dtype, const std::byte* panel, int step, std::byte* to) {
  const int bytes = static_cast<int>(group_bytes(dtype)), tile = dtype == DType::int4 ? 256 : 512;
  const std::byte* from = panel + static_cast<std::size_t>(step) * bytes;
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + 2048 + line, 0, 2);
  for (int i = 0; i < 2; ++i)
    if (dtype == DType::int4)
      unpack_int4(from + i * tile, from + 2 * tile + i * 32, reinterpret_cast<bf16*>(to) + i * 512);
    else
      unpack_int8(from + i * tile, from + 2 * tile + i * 32, reinterpret_cast<bf16*>(to) + i * 512);
}

// ---- levels ----

#if defined(__AVX512BF16__) && !CHILIAD_AMX

// Words that hold 4 nibbles each -> the levels 0..15 in their lowest nibbles, as bfloat16.
struct Int4Levels {
  static constexpr int kLoads = 4, kPairs = 4;  // per group: vectors of a block, and pairs of k in each
  __m512i table;
  Int4Levels() {
    alignas(64) bf16 values[32];
    for (int i = 0; i < 32; ++i) values[i] = to_bf16(static_cast<float>(i % 16));  // the look-up sees 5 bits
    table = _mm512_load_si512(values);
  }
  template <int S>
  CHILIAD_INLINE __m512bh get(__m512i words) const {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * S), table);
  }
};

// Bytes -> levels as bfloat16. -128 is not a level.
struct Int8Levels {
  static constexpr int kLoads = 8, kPairs = 2;
  __m512i low[2], high[2];  // bytes of the bfloat16 values 0..127
  Int8Levels() {
    alignas(64) std::uint8_t bytes[2][128];
    for (int i = 0; i < 128; ++i) {
      bytes[0][i] = static_cast<std::uint8_t>(to_bf16(static_cast<float>(i)));
      bytes[1][i] = static_cast<std::uint8_t>(to_bf16(static_cast<float>(i)) >> 8);
    }
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(bytes[0] + 64 * i);
      high[i] = _mm512_load_si512(bytes[1] + 64 * i);
    }
  }
  template <int S>
  CHILIAD_INLINE __m512bh get(__m512i bytes) const {
    const __m512i magnitude = _mm512_abs_epi8(bytes);  // the look-up sees 7 bits
    const __m512i l = _mm512_permutex2var_epi8(low[0], magnitude, low[1]);
    const __m512i h = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high[0], magnitude, high[1]), bytes,
                                                _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);  // h | (bytes & sign)
    return (__m512bh)(S ? _mm512_unpackhi_epi8(l, h) : _mm512_unpacklo_epi8(l, h));
  }
};

// Lines [first, last) of every group, this far ahead in memory, are fetched during a pass.
struct Fetch {
  std::ptrdiff_t ahead;
  int first, last;
};

// c[R][32] = a[R][K] * panel. Rows of c are kStride apart.
template <class Levels, bool Minimum, int R, bool Rank>
void gemm_levels(const std::byte* a, const float* sums, const std::byte* panel, int k_padded, const Fetch& fetch,
                 Lookahead& rank, float* c) {
  constexpr int kTile = Levels::kLoads * 64, kBytes = 2 * kTile + (Minimum ? 128 : 64);
  const Levels levels;
  constexpr int kSome = 8, kLines = Lookahead::kChunk / Levels::kLoads;
  const std::byte* rank_rows[kSome];
  bool some = false;
  for (int k = 0; k < k_padded; k += 32, a += 1024, sums += kRowTile, panel += kBytes) {
    if (Rank && k / 32 % kSome == 0) some = rank && rank.chunks(k_padded / 32 - k / 32 < kSome ? k_padded / 32 - k / 32 : kSome, panel, rank_rows);
    const std::byte* rank_at = Rank && some ? rank_rows[k / 32 % kSome] : panel;
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int line = fetch.first; line < fetch.last; ++line) _mm_prefetch(panel + fetch.ahead + line * 64, _MM_HINT_T0);
    auto pair = [&]<int S>(const __m512i& v0, const __m512i& v1, const std::byte* at) {
      const __m512bh w0 = levels.template get<S>(v0), w1 = levels.template get<S>(v1);
      for (int r = 0; r < R; ++r) {
        int both;
        std::memcpy(&both, at + r * 64 + S * 4, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, w0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, w1);
      }
    };
    for (int j = 0; j < Levels::kLoads; ++j) {
      const __m512i v0 = _mm512_load_si512(panel + j * 64), v1 = _mm512_load_si512(panel + kTile + j * 64);
      const std::byte* at = a + j * Levels::kPairs * 4;
      for (int line = 0; Rank && line < kLines; ++line, rank_at += 64) _mm_prefetch(rank_at, _MM_HINT_T1);
      pair.template operator()<0>(v0, v1, at);
      pair.template operator()<1>(v0, v1, at);
      if constexpr (Levels::kPairs == 4) {
        pair.template operator()<2>(v0, v1, at);
        pair.template operator()<3>(v0, v1, at);
      }
    }
    for (int v = 0; v < 2; ++v) {
      const __m512 d = load_halves(panel + 2 * kTile + v * 32);
      const __m512 m = Minimum ? load_halves(panel + 2 * kTile + 64 + v * 32) : _mm512_setzero_ps();
      for (int r = 0; r < R; ++r) {
        float* to = c + r * kStride + v * kLanes;
        __m512 y = k ? _mm512_fmadd_ps(d, sum[r][v], vload(to)) : d * sum[r][v];
        if (Minimum) y = _mm512_fmadd_ps(m, vset(sums[r]), y);
        vstore(to, y);
      }
    }
  }
}

// c[rows][32] = up to 32 rows of two input tiles * panel. One pass alone fetches what comes a little
// later; several share the next panel, each as much as its part of the rows, so that memory is
// asked evenly.
template <class Levels, bool Minimum>
void gemm_levels(const ProjectPlan& plan, const std::byte* const* tiles, const std::byte* panel, int rows, bool fetch,
                 Lookahead& rank, float* c) {
  constexpr int kMost = 8, kLines = 2 * Levels::kLoads + (Minimum ? 2 : 1);
  constexpr std::ptrdiff_t kNear = 16384;  // bytes, measured: 8 to 24 KB are equal, 3 KB take 10 to 20 % longer
  const auto ahead = rows > kMost ? static_cast<std::ptrdiff_t>(plan.panel_bytes) : kNear;
  for (int r = 0; r < rows;) {
    const std::byte* tile = tiles[r / kRowTile];
    const int row = r % kRowTile;
    auto pass = [&]<int R>() {
      const Fetch lines{ahead, fetch ? kLines * r / rows : 0, fetch ? kLines * (r + R) / rows : 0};
      auto* call = rank ? gemm_levels<Levels, Minimum, R, true> : gemm_levels<Levels, Minimum, R, false>;
      call(tile + row * 64, reinterpret_cast<const float*>(tile + plan.sums_at) + row, panel, plan.k_padded, lines, rank,
           c + r * kStride);
      r += R;
    };
    const int left = rows - r;
    if (left >= 8) pass.template operator()<8>();
    else if (left >= 4) pass.template operator()<4>();
    else if (left >= 2) pass.template operator()<2>();
    else pass.template operator()<1>();
  }
}

void gemm_levels(const ProjectPlan& plan, const std::byte* const* tiles, const std::byte* panel, int rows, bool fetch,
                 Lookahead& rank, float* c) {
  auto* call = plan.dtype == DType::int4 ? gemm_levels<Int4Levels, true> : gemm_levels<Int8Levels, false>;
  call(plan, tiles, panel, rows, fetch, rank, c);
}

#endif

// ---- parts ----

#if CHILIAD_AMX

// One row's inputs in parts (see ProjectPlan::parts), from its input tile.
void make_parts(const ProjectPlan& plan, const std::byte* tile, int row, std::byte* to) {
  const int groups = plan.k_padded / 32;
  float* scales = reinterpret_cast<float*>(to + 2 * plan.k_padded);
  std::int32_t* sums = reinterpret_cast<std::int32_t*>(scales + groups);
  // levels of int4 lie in the order of k 0 4 1 5, 2 6 3 7 (see pack.cpp)
  const __m256i order = _mm256_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9,
                                         13, 10, 14, 11, 15);
  for (int g = 0; g < groups; ++g, tile += 1024, to += 64) {
    const bf16* x = reinterpret_cast<const bf16*>(tile + row * 64);
    const Vec a = vload(x), b = vload(x + 16);
    NaNs nans;
    nans.add(a);
    nans.add(b);
    const float largest = vtop(vmax(vabs(a), vabs(b)));
    const float scale = nans.any() ? __builtin_nanf("") : largest / 32512.0f;  // what is not finite shows in the scale
    const float turn = scale > 0 ? 1.0f / scale : 0.0f;
    const __m512i i = _mm512_cvtps_epi32(a * vset(turn)), j = _mm512_cvtps_epi32(b * vset(turn));
    scales[g] = scale;
    sums[g] = _mm512_reduce_add_epi32(_mm512_add_epi32(i, j));
    // x = 256 high + low, -128 <= low < 128
    const __m512i half = _mm512_set1_epi32(128);
    auto high = [&](__m512i v) { return _mm512_srai_epi32(_mm512_add_epi32(v, half), 8); };
    auto pack = [&](__m512i u, __m512i v) {
      const __m256i bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(v), _mm512_cvtepi32_epi8(u));
      return plan.dtype == DType::int4 ? _mm256_shuffle_epi8(bytes, order) : bytes;
    };
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pack(high(i), high(j)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), pack(i, j));
  }
}

// c[R][32] = R rows of parts times a panel.
template <bool Int4, int R>
void gemm_parts(const std::byte* x, std::size_t row_bytes, const std::byte* panel, int k_padded, bool fetch, float* c) {
  constexpr int kTile = Int4 ? 256 : 512, kBytes = 2 * kTile + (Int4 ? 128 : 64);
  constexpr int kAhead = 3072;
  const int groups = k_padded / 32;
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  const __m512i middle = _mm512_set1_epi8(static_cast<char>(0x80)), nibble = _mm512_set1_epi8(15);
  __m512 y[R][2];
  for (int r = 0; r < R; ++r) y[r][0] = y[r][1] = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g, panel += kBytes) {
    __m512i high[R][2], low[R][2];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 2; ++v) high[r][v] = low[r][v] = _mm512_setzero_si512();
    if (fetch)
      for (int line = 0; line < kBytes; line += 64) _mm_prefetch(panel + kAhead + line, _MM_HINT_T1);
    auto add = [&](__m512i levels, int v, int at) {  // four k of 16 columns
      for (int r = 0; r < R; ++r) {
        std::int32_t h, l;
        std::memcpy(&h, x + r * row_bytes + g * 64 + at, 4);
        std::memcpy(&l, x + r * row_bytes + g * 64 + 32 + at, 4);
        high[r][v] = _mm512_dpbusd_epi32(high[r][v], levels, _mm512_set1_epi32(h));
        low[r][v] = _mm512_dpbusd_epi32(low[r][v], levels, _mm512_set1_epi32(l));
      }
    };
    for (int v = 0; v < 2; ++v)
      for (int j = 0; j < kTile / 64; ++j) {
        const __m512i line = _mm512_load_si512(panel + v * kTile + j * 64);
        if constexpr (Int4) {
          add(_mm512_and_si512(line, nibble), v, 8 * j);
          add(_mm512_and_si512(_mm512_srli_epi16(line, 4), nibble), v, 8 * j + 4);
        } else {
          add(_mm512_xor_si512(_mm512_shuffle_epi8(line, order), middle), v, 4 * j);  // levels + 128
        }
      }
    for (int v = 0; v < 2; ++v) {
      const __m512 d = load_halves(panel + 2 * kTile + v * 32);
      for (int r = 0; r < R; ++r) {
        const float* scales = reinterpret_cast<const float*>(x + r * row_bytes + 2 * k_padded);
        const std::int32_t sum = reinterpret_cast<const std::int32_t*>(scales + groups)[g];
        __m512i all = _mm512_add_epi32(_mm512_slli_epi32(high[r][v], 8), low[r][v]);
        if (!Int4) all = _mm512_sub_epi32(all, _mm512_set1_epi32(128 * sum));
        __m512 products = _mm512_cvtepi32_ps(all) * d;
        if (Int4) products = _mm512_fmadd_ps(load_halves(panel + 2 * kTile + 64 + v * 32), vset(static_cast<float>(sum)), products);
        y[r][v] = _mm512_fmadd_ps(vset(scales[g]), products, y[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) vstore(c + r * kStride + v * kLanes, y[r][v]);
}

void gemm_parts(const ProjectPlan& plan, const std::byte* panel, int rows, bool fetch, float* c) {
  for (int r = 0; r < rows;) {
    auto pass = [&]<int R>() {
      auto* call = plan.dtype == DType::int4 ? gemm_parts<true, R> : gemm_parts<false, R>;
      call(plan.parts + r * plan.part_bytes, plan.part_bytes, panel, plan.k_padded, fetch && r == 0, c + r * kStride);
      r += R;
    };
    const int left = rows - r;
    if (left >= 4) pass.template operator()<4>();
    else if (left >= 2) pass.template operator()<2>();
    else pass.template operator()<1>();
  }
}

#endif

}  // namespace
}  // namespace chiliad
