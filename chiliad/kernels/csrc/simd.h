// One vector of floats, as wide as the instruction set of the including file allows, and the
// few operations the kernels need. For .inl files only: everything is in an anonymous
// namespace, because each instruction set needs its own copy.
//
// `Vec` supports + - * / as the compilers' vector types do. kLanes divides 16.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CHILIAD_INLINE inline __attribute__((always_inline))

namespace {

using bf16 = std::uint16_t;  // raw bits of a bfloat16

CHILIAD_INLINE float to_float(bf16 x) {
  const std::uint32_t bits = std::uint32_t{x} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

CHILIAD_INLINE bf16 to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;
using VecInt = __m512i;

CHILIAD_INLINE Vec vset(float x) { return _mm512_set1_ps(x); }
CHILIAD_INLINE Vec vload(const float* p) { return _mm512_loadu_ps(p); }
CHILIAD_INLINE Vec vload(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
CHILIAD_INLINE __mmask16 vmask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
CHILIAD_INLINE Vec vload(const float* p, int n) { return _mm512_maskz_loadu_ps(vmask(n), p); }
CHILIAD_INLINE Vec vload(const bf16* p, int n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(vmask(n), p)), 16));
}
CHILIAD_INLINE void vstore(float* p, Vec x) { _mm512_storeu_ps(p, x); }
CHILIAD_INLINE void vstore(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, vmask(n), x); }
CHILIAD_INLINE void vstream(float* p, Vec x) { _mm512_stream_ps(p, x); }  // past the caches; p is aligned
CHILIAD_INLINE Vec vload(const std::int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
CHILIAD_INLINE Vec vload(const std::int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(vmask(n), p)));
}
CHILIAD_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
CHILIAD_INLINE Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
CHILIAD_INLINE Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
CHILIAD_INLINE Vec vsqrt(Vec a) { return _mm512_sqrt_ps(a); }
CHILIAD_INLINE Vec vabs(Vec a) { return _mm512_abs_ps(a); }
CHILIAD_INLINE VecInt vround(Vec a) { return _mm512_cvtps_epi32(a); }  // to nearest even
CHILIAD_INLINE Vec vfloat(VecInt a) { return _mm512_cvtepi32_ps(a); }
CHILIAD_INLINE Vec vscale2(Vec a, VecInt n) {  // a * 2^n, n in the range of normal exponents
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(n, 23)));
}
CHILIAD_INLINE void vstore_bf16(bf16* p, Vec x) {
#if defined(__AVX512BF16__)
  const __m256bh y = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &y, 32);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i y = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  y = _mm512_mask_mov_epi32(y, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(y));
#endif
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Vec = __m256;
using VecInt = __m256i;

CHILIAD_INLINE Vec vset(float x) { return _mm256_set1_ps(x); }
CHILIAD_INLINE Vec vload(const float* p) { return _mm256_loadu_ps(p); }
CHILIAD_INLINE Vec vload(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
CHILIAD_INLINE VecInt vmask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
CHILIAD_INLINE Vec vload(const float* p, int n) { return _mm256_maskload_ps(p, vmask(n)); }
CHILIAD_INLINE Vec vload(const bf16* p, int n) {
  alignas(16) bf16 copy[8] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return vload(copy);
}
CHILIAD_INLINE void vstore(float* p, Vec x) { _mm256_storeu_ps(p, x); }
CHILIAD_INLINE void vstore(float* p, Vec x, int n) { _mm256_maskstore_ps(p, vmask(n), x); }
CHILIAD_INLINE void vstream(float* p, Vec x) { _mm256_stream_ps(p, x); }
CHILIAD_INLINE Vec vload(const std::int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
CHILIAD_INLINE Vec vload(const std::int8_t* p, int n) {
  alignas(8) std::int8_t copy[8] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return vload(copy);
}
CHILIAD_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
CHILIAD_INLINE Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
CHILIAD_INLINE Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
CHILIAD_INLINE Vec vsqrt(Vec a) { return _mm256_sqrt_ps(a); }
CHILIAD_INLINE Vec vabs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
CHILIAD_INLINE VecInt vround(Vec a) { return _mm256_cvtps_epi32(a); }
CHILIAD_INLINE Vec vfloat(VecInt a) { return _mm256_cvtepi32_ps(a); }
CHILIAD_INLINE Vec vscale2(Vec a, VecInt n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(n, 23)));
}
CHILIAD_INLINE void vstore_bf16(bf16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i near = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256i y = _mm256_blendv_epi8(near, _mm256_or_si256(upper, _mm256_set1_epi32(0x40)), _mm256_castps_si256(nan));
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(y, y), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
}

#else

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef std::int32_t VecInt __attribute__((vector_size(16)));

CHILIAD_INLINE Vec vset(float x) { return Vec{x, x, x, x}; }
CHILIAD_INLINE Vec vload(const float* p) {
  Vec x;
  std::memcpy(&x, p, 16);
  return x;
}
CHILIAD_INLINE Vec vload(const bf16* p) { return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
CHILIAD_INLINE Vec vload(const std::int8_t* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
template <class T>
CHILIAD_INLINE Vec vload(const T* p, int n) {
  T copy[4] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return vload(copy);
}
CHILIAD_INLINE void vstore(float* p, Vec x) { std::memcpy(p, &x, 16); }
CHILIAD_INLINE void vstore(float* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
CHILIAD_INLINE void vstream(float* p, Vec x) { vstore(p, x); }
CHILIAD_INLINE Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; }
CHILIAD_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
CHILIAD_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
CHILIAD_INLINE Vec vsqrt(Vec a) {
  return Vec{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
CHILIAD_INLINE Vec vabs(Vec a) { return a < 0 ? -a : a; }
CHILIAD_INLINE VecInt vround(Vec a) {
  VecInt y;
  for (int i = 0; i < 4; ++i) y[i] = static_cast<std::int32_t>(__builtin_rintf(a[i]));
  return y;
}
CHILIAD_INLINE Vec vfloat(VecInt a) { return __builtin_convertvector(a, Vec); }
CHILIAD_INLINE Vec vscale2(Vec a, VecInt n) {
  VecInt bits;
  std::memcpy(&bits, &a, 16);
  bits += n << 23;
  std::memcpy(&a, &bits, 16);
  return a;
}
CHILIAD_INLINE void vstore_bf16(bf16* p, Vec x) {
  for (int i = 0; i < 4; ++i) p[i] = to_bf16(x[i]);
}

#endif

// Halving in a fixed order, so that a sum never depends on where it is computed.
CHILIAD_INLINE float vsum(Vec x) {
  float lane[kLanes];
  std::memcpy(lane, &x, sizeof(x));
#if defined(__AVX512F__)
  const __m256 h8 = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  const __m256 h8 = x;
#endif
#if defined(__AVX2__)
  const __m128 h4 = _mm_add_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
  const __m128 h2 = _mm_add_ps(h4, _mm_movehl_ps(h4, h4));
  return _mm_cvtss_f32(_mm_add_ss(h2, _mm_shuffle_ps(h2, h2, 1)));
#else
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
#endif
}

// e^x: 2^n * p(r), |r| <= ln(2)/2, degree 6; relative error about 1e-7. Clamped to finite results.
CHILIAD_INLINE Vec vexp(Vec x) {
  x = vmin(vmax(x, vset(-87.0f)), vset(88.0f));
  const VecInt n = vround(x * vset(1.44269504f));
  const Vec nf = vfloat(n);
  const Vec r = vfma(nf, vset(2.12194440e-4f), vfma(nf, vset(-0.693359375f), x));
  Vec p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vfma(p, r * r, r + vset(1.0f));
  return vscale2(p, n);
}

CHILIAD_INLINE Vec vreciprocal(Vec x) {  // relative error about 1e-7
#if defined(__AVX512F__)
  const Vec r = _mm512_rcp14_ps(x);  // division takes 16 cycles
  return r * _mm512_fnmadd_ps(x, r, vset(2.0f));
#else
  return vset(1.0f) / x;
#endif
}

CHILIAD_INLINE Vec vsilu(Vec x) { return x * vreciprocal(vset(1.0f) + vexp(vset(0.0f) - x)); }

// x/2 (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
CHILIAD_INLINE Vec vgelu_tanh(Vec x) {
  const Vec u2 = x * vfma(x * x, vset(2 * 0.7978845608f * 0.044715f), vset(2 * 0.7978845608f));
  return x * vreciprocal(vset(1.0f) + vexp(vset(0.0f) - u2));
}

// x/2 (1 + erf(x / sqrt 2)), erf by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7)
CHILIAD_INLINE Vec vgelu(Vec x) {
  const Vec a = vabs(x) * vset(0.70710678f);
  const Vec t = vreciprocal(vfma(a, vset(0.3275911f), vset(1.0f)));
  Vec p = vset(1.061405429f);
  p = vfma(p, t, vset(-1.453152027f));
  p = vfma(p, t, vset(1.421413741f));
  p = vfma(p, t, vset(-0.284496736f));
  p = vfma(p, t, vset(0.254829592f));
  const Vec tail = p * t * vexp(vset(0.0f) - a * a);  // 1 - erf(|x| / sqrt 2)
  const Vec half = vset(0.5f) * x;
  return vfma(vabs(half), vset(1.0f) - tail, half);
}

}  // namespace
