// What attention and sampling need of vectors beyond simd.h. For .inl files only.
#pragma once

#include "simd.h"

namespace chiliad {
namespace {

// Two vectors from 2 * kLanes bfloat16: the even ones and the odd ones. This is how K and V lie
// (pairs of head_dim, pairs of tokens), and it costs a shift and a mask.
CHILIAD_INLINE void vload_pairs(const bf16* p, Vec& even, Vec& odd) {
#if defined(__AVX512F__)
  const __m512i x = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
#elif defined(__AVX2__)
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
#else
  VecInt x;
  std::memcpy(&x, p, 16);
  even = reinterpret_cast<Vec>(x << 16);
  odd = reinterpret_cast<Vec>(x & static_cast<std::int32_t>(0xffff0000u));
#endif
}

CHILIAD_INLINE float vtop(Vec x) {  // the largest lane
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#elif defined(__AVX2__)
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
#else
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
#endif
}

CHILIAD_INLINE unsigned vreach(Vec x, float limit) {  // bit i: lane i >= limit
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_GE_OQ)));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<unsigned>(x[i] >= limit) << i;
  return bits;
#endif
}

// 2^x for x <= 0 with relative error below 2e-7; exactly 1 for 0, exactly 0 for -infinity, NaN
// for NaN.
CHILIAD_INLINE Vec vexp2_below(Vec x) {
#if defined(__AVX512F__)
  x = vmax(vset(-200.0f), x);
  const Vec n = _mm512_roundscale_ps(x, 0x08);
#else
  x = vmax(vset(-127.0f), x);  // in this order a NaN stays
  const Vec magic = vset(12582912.0f), n = (x + magic) - magic;  // to nearest
#endif
  const Vec f = x - n;
  Vec y = vfma(vset(0.00132647311f), f, vset(0.009671514f));
  y = vfma(y, f, vset(0.0555073375f));
  y = vfma(y, f, vset(0.240222421f));
  y = vfma(y, f, vset(0.693146978f));
  y = vfma(y, f, vset(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(y, n);
#elif defined(__AVX2__)
  // exponent bits of n; -127 makes them zero, and with them the product
  return y * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(vround(n), _mm256_set1_epi32(127)), 23));
#else
  return y * reinterpret_cast<Vec>((__builtin_convertvector(n, VecInt) + 127) << 23);
#endif
}

CHILIAD_INLINE float exp2_below(float x) {
  float y[kLanes];
  vstore(y, vexp2_below(vset(x)));
  return y[0];
}

// Whether any vector added so far holds a NaN.
struct NaNs {
#if defined(__AVX512F__)
  __mmask16 seen = 0;
  CHILIAD_INLINE void add(Vec x) { seen |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
  CHILIAD_INLINE bool any() const { return seen != 0; }
#elif defined(__AVX2__)
  __m256 seen = _mm256_setzero_ps();
  CHILIAD_INLINE void add(Vec x) { seen = _mm256_or_ps(seen, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
  CHILIAD_INLINE bool any() const { return _mm256_movemask_ps(seen) != 0; }
#else
  VecInt seen = {0, 0, 0, 0};
  CHILIAD_INLINE void add(Vec x) { seen |= x != x; }
  CHILIAD_INLINE bool any() const { return (seen[0] | seen[1] | seen[2] | seen[3]) != 0; }
#endif
};

}  // namespace
}  // namespace chiliad
