// Norms, and phase 0 of a projection: inputs are normalised, rounded and laid out in tiles.
#pragma once

#include "linear_quantized.inl"

namespace chiliad {
namespace {

// ---- norm ----

void norm_row(const float* x, int n, const Norm& norm, float* y, bool add) {
  const int whole = n / kLanes * kLanes, rest = n - whole;
  Vec mean = vset(0.0f);
  if (norm.kind == NormKind::layer) {
    Vec sum = vset(0.0f);
    for (int i = 0; i < whole; i += kLanes) sum = sum + vload(x + i);
    if (rest) sum = sum + vload(x + whole, rest);
    mean = vset(vsum(sum) / n);
  }
  Vec squares = vset(0.0f);
  for (int i = 0; i < whole; i += kLanes) {
    const Vec v = vload(x + i) - mean;
    squares = vfma(v, v, squares);
  }
  float variance = vsum(squares);
  for (int i = whole; i < n; ++i) {
    float m;
    std::memcpy(&m, &mean, 4);
    variance += (x[i] - m) * (x[i] - m);
  }
  const Vec scale = vset(1.0f / __builtin_sqrtf(variance / n + norm.eps));
  for (int i = 0; i < n; i += kLanes) {
    const int left = n - i < kLanes ? n - i : kLanes;
    Vec v = (vload(x + i, left) - mean) * scale * vload(norm.weight + i, left);
    if (norm.bias) v = v + vload(norm.bias + i, left);
    if (add) v = v + vload(y + i, left);
    vstore(y + i, v, left);
  }
}

// ---- phase 0: inputs ----

// One row of a bfloat16 input tile, times d if there is one. k is padded with zeros.
template <class D>
void bf16_row(const ProjectPlan& plan, const float* x, const D* d, std::byte* tile, int r) {
  alignas(64) float chunk[32];
  for (int k = 0; k < plan.k_padded; k += 32) {
    const int n = plan.in_features - k < 32 ? plan.in_features - k : 32;
    const float* from = x + k;
    if (n < 32 || d) {
      for (int i = 0; i < 32; ++i) chunk[i] = 0;
      for (int i = 0; i < n; i += kLanes) {
        const int left = n - i < kLanes ? n - i : kLanes;
        Vec v = vload(x + k + i, left);
        if (d) v = v * vload(d + k + i, left);
        vstore(chunk + i, v, left);
      }
      from = chunk;
    }
    bf16* to = kBf16Tiles ? reinterpret_cast<bf16*>(tile + k / 32 * 1024 + r * 64) : nullptr;
    alignas(64) bf16 rounded[32];
    for (int i = 0; i < 32; i += kLanes) vstore_bf16((kBf16Tiles ? to : rounded) + i, vload(from + i));
    if constexpr (kBf16Tiles) {
      if (plan.sums_at) {
        Vec sum = vload(to);
        for (int i = kLanes; i < 32; i += kLanes) sum = sum + vload(to + i);
        reinterpret_cast<float*>(tile + plan.sums_at)[k / 32 * kRowTile + r] = vsum(sum);
      }
    }
    if (!kBf16Tiles) {  // the same values, as floats
      float* row = reinterpret_cast<float*>(tile) + static_cast<std::size_t>(r) * plan.k_padded + k;
      for (int i = 0; i < 32; i += kLanes) vstore(row + i, vload(rounded + i));
    }
  }
}

template <class D>
void input_row(const ProjectPlan& plan, const float* x, const D* d, std::byte* tile, int r) {
  if (plan.dtype != DType::float32) return bf16_row(plan, x, d, tile, r);
  float* row = reinterpret_cast<float*>(tile) + static_cast<std::size_t>(r) * plan.in_features;
  for (int k = 0; k < plan.in_features; k += kLanes) {
    const int left = plan.in_features - k < kLanes ? plan.in_features - k : kLanes;
    Vec v = vload(x + k, left);
    if (d) v = v * vload(d + k, left);
    vstore(row + k, v, left);
  }
}

// The first use of projection p that reaches beyond `row`.
const Use* find_use(const ProjectPlan& plan, int p, int row) {
  const Use *low = plan.uses + plan.uses_from[p], *high = plan.uses + plan.uses_from[p + 1];
  while (low < high) {
    const Use* middle = low + (high - low) / 2;
    if (middle->stop <= row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

#if CHILIAD_AMX
// Exchange rows and columns of 16 x 16 words of 32 bits, which bfloat16 pairs are here.
CHILIAD_INLINE void turn(__m512i (&a)[16]) {
  __m512i b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 q + c] holds, in its quarter l, column 4 l + c of rows 4 q .. 4 q + 3
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i low2 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd), high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    b[c] = _mm512_shuffle_i32x4(low, high, 0x88);
    b[8 + c] = _mm512_shuffle_i32x4(low, high, 0xdd);
    b[4 + c] = _mm512_shuffle_i32x4(low2, high2, 0x88);
    b[12 + c] = _mm512_shuffle_i32x4(low2, high2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) a[i] = b[i];
}

// An input tile with rows and pairs exchanged is what a tile multiplication wants as its right side, so that rank rows
// can be the left side as they lie in the arena.
void turn_tile(const std::byte* tile, std::byte* to) {
  __m512i a[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(tile + i * 64);
  turn(a);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, a[i]);
}
#endif

// `room`: for one row.
void input_tile(const ProjectPlan& plan, int tile, float* room) {
  const int row_tiles = (plan.rows + kRowTile - 1) / kRowTile;
  const int first = tile * kRowTile, last = first + kRowTile < plan.rows ? first + kRowTile : plan.rows;
  const std::size_t n = plan.in_features;
  const bool normed = plan.norm.kind != NormKind::none;
  const float* x = normed && plan.x32 ? plan.x32 : plan.x;
  for (int row = first; row < last && !plan.ready; ++row) {
    const float* from = x + row * n;
    if (normed) {
      float* to = plan.x32 ? plan.x32 + row * n : room;
      norm_row(plan.x + row * n, plan.in_features, plan.norm, to, false);
      from = to;
    }
    if (plan.input) input_row<float>(plan, from, nullptr, plan.input + tile * plan.tile_bytes, row - first);
  }
#if CHILIAD_AMX
  if (plan.parts)
    for (int row = first; row < last; ++row)
      make_parts(plan, plan.input + tile * plan.tile_bytes, row - first, plan.parts + row * plan.part_bytes);
  if (plan.turned)
    for (int k = 0; k < plan.k_padded; k += 32)
      turn_tile(plan.input + tile * plan.tile_bytes + k * 32, plan.turned + tile * plan.tile_bytes + k * 32);
#endif
  if (!plan.scaled) return;
  for (int p = 0; p < plan.num_projections; ++p) {
    const int at = plan.scaled_at[p * row_tiles + tile];
    if (at < 0) continue;
    std::byte* to = plan.scaled + at * plan.tile_bytes;
    const Use* use = find_use(plan, p, first);
    const Use* end = plan.uses + plan.uses_from[p + 1];
    for (int row = first; row < last; ++row) {
      while (use < end && use->stop <= row) ++use;
      const std::uint8_t* d = use < end && use->start <= row ? use->d : nullptr;
      if (!d)
        input_row<float>(plan, x + row * n, nullptr, to, row - first);
      else if (vectors_beside(use->dtype) == DType::bfloat16)
        input_row(plan, x + row * n, reinterpret_cast<const bf16*>(d), to, row - first);
      else
        input_row(plan, x + row * n, reinterpret_cast<const float*>(d), to, row - first);
    }
  }
}

}  // namespace
}  // namespace chiliad
