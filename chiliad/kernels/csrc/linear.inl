// `project` and `norm` for one instruction set; see linear.h for the layouts.
//
// project runs in three phases with a barrier between them:
//   0  inputs: normalise rows, round them, lay them out in tiles
//   1  shrink: z = scale * (A x) for every (segment, projection, ranks), each rank row read once
//   2  panels: base GEMM of 32 columns into a small buffer that stays in the L1 cache, then the
//      epilogue on it: bias, g, c, z B (expand), activation, residual, store.
#include "linear.h"
#include "simd.h"

namespace chiliad {
namespace {

constexpr int kVecs = kBlock / kLanes;  // vectors per block
#if defined(__AMX_BF16__)
constexpr bool kAmx = true, kBf16Tiles = true;
#elif defined(__AVX512BF16__)
constexpr bool kAmx = false, kBf16Tiles = true;
#else
constexpr bool kAmx = false, kBf16Tiles = false;
#endif
// Rows per pass of a GEMM: as many accumulators (rows x 32 columns) as fit the registers.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 3;
#else
constexpr int kRows = 1;
#endif

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
    if (!kBf16Tiles) {  // the same values, as floats
      float* row = reinterpret_cast<float*>(tile) + static_cast<std::size_t>(r) * plan.k_padded + k;
      for (int i = 0; i < 32; i += kLanes) vstore(row + i, vload(rounded + i));
    }
  }
}

template <class D>
void input_row(const ProjectPlan& plan, const float* x, const D* d, std::byte* tile, int r) {
  if (plan.dtype == DType::bfloat16) return bf16_row(plan, x, d, tile, r);
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

void input_tile(const ProjectPlan& plan, int tile) {
  const int row_tiles = (plan.rows + kRowTile - 1) / kRowTile;
  const int first = tile * kRowTile, last = first + kRowTile < plan.rows ? first + kRowTile : plan.rows;
  const std::size_t n = plan.in_features;
  const float* x = plan.x;
  if (plan.norm.kind != NormKind::none) {
    for (int row = first; row < last; ++row) norm_row(plan.x + row * n, plan.in_features, plan.norm, plan.x32 + row * n, false);
    x = plan.x32;
  }
  if (plan.input)
    for (int row = first; row < last; ++row)
      input_row<float>(plan, x + row * n, nullptr, plan.input + tile * plan.tile_bytes, row - first);
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
      else if (use->dtype == DType::bfloat16)
        input_row(plan, x + row * n, reinterpret_cast<const bf16*>(d), to, row - first);
      else
        input_row(plan, x + row * n, reinterpret_cast<const float*>(d), to, row - first);
    }
  }
}

// ---- phase 1: shrink ----

// z[r][j] = scale[j] * (x_r . a_j). One vector of partial sums per output, added up at the end:
// the order of additions does not depend on R and J.
template <class T, int R, int J>
void dots(const std::uint8_t* arena, const std::int64_t* at, const float* x, int n, const float* scale, float* z, int rank) {
  const T* a[J];
  for (int j = 0; j < J; ++j) a[j] = reinterpret_cast<const T*>(arena + at[j]);
  Vec sum[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) sum[r][j] = vset(0.0f);
  const int whole = n / kLanes * kLanes;
  for (int k = 0; k < whole; k += kLanes) {
    Vec row[R];
    for (int r = 0; r < R; ++r) row[r] = vload(x + static_cast<std::size_t>(r) * n + k);
    for (int j = 0; j < J; ++j) {
      const Vec v = vload(a[j] + k);
      for (int r = 0; r < R; ++r) sum[r][j] = vfma(v, row[r], sum[r][j]);
    }
  }
  if (whole < n)
    for (int j = 0; j < J; ++j) {
      const Vec v = vload(a[j] + whole, n - whole);
      for (int r = 0; r < R; ++r)
        sum[r][j] = vfma(v, vload(x + static_cast<std::size_t>(r) * n + whole, n - whole), sum[r][j]);
    }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) z[r * rank + j] = vsum(sum[r][j]) * scale[j];
}

template <class T>
void shrink(const ProjectPlan& plan, const ShrinkTask& task) {
  constexpr int kJ = kLanes == 16 ? 4 : 2;
  const Use& use = *task.use;
  const int n = plan.in_features, end = task.rank + task.ranks;
  const float* x = (plan.x32 ? plan.x32 : plan.x) + static_cast<std::size_t>(task.row) * n;
  float* z = use.z + static_cast<std::size_t>(task.row - use.start) * use.rank;
  int r = 0;
  for (; r + 4 <= task.rows; r += 4) {
    const float* xr = x + static_cast<std::size_t>(r) * n;
    float* zr = z + r * use.rank;
    int j = task.rank;
    for (; j + kJ <= end; j += kJ) dots<T, 4, kJ>(plan.arena, use.a + j, xr, n, use.scale + j, zr + j, use.rank);
    for (; j < end; ++j) dots<T, 4, 1>(plan.arena, use.a + j, xr, n, use.scale + j, zr + j, use.rank);
  }
  for (; r < task.rows; ++r) {
    const float* xr = x + static_cast<std::size_t>(r) * n;
    float* zr = z + r * use.rank;
    int j = task.rank;
    for (; j + 8 <= end; j += 8) dots<T, 1, 8>(plan.arena, use.a + j, xr, n, use.scale + j, zr + j, use.rank);
    for (; j < end; ++j) dots<T, 1, 1>(plan.arena, use.a + j, xr, n, use.scale + j, zr + j, use.rank);
  }
}

// ---- phase 2: panels ----

// c[R][32] = a[R][K] * panel; float32. One accumulator per output.
template <int R>
void gemm_f32(const float* a, std::size_t lda, const float* b, int k_count, float* c) {
  constexpr int V = 2 * kVecs;
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = vset(0.0f);
  for (int k = 0; k < k_count; ++k, b += kPanel) {
    Vec row[R];
    for (int r = 0; r < R; ++r) row[r] = vset(a[r * lda + k]);
    for (int v = 0; v < V; ++v) {
      const Vec w = vload(b + v * kLanes);
      for (int r = 0; r < R; ++r) sum[r][v] = vfma(row[r], w, sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) vstore(c + r * kPanel + v * kLanes, sum[r][v]);
}

// The same for bfloat16 weights in pairs of k.
#if defined(__AVX512BF16__)

template <int R>
void gemm_bf16(const std::byte* a, const std::byte* b, int k_padded, float* c) {
  __m512 sum[R][2];
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int k = 0; k < k_padded; k += 32, a += 1024, b += 2048)
    for (int i = 0; i < 16; ++i) {
      const __m512bh w0 = (__m512bh)_mm512_load_si512(b + i * 64);
      const __m512bh w1 = (__m512bh)_mm512_load_si512(b + 1024 + i * 64);
      for (int r = 0; r < R; ++r) {
        int pair;
        std::memcpy(&pair, a + r * 64 + i * 4, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, w0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, w1);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) vstore(c + r * kPanel + v * kLanes, sum[r][v]);
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
    for (int v = 0; v < V; ++v) vstore(c + r * kPanel + v * kLanes, sum[r][v]);
}

#endif

#if defined(__AMX_BF16__)

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void enter() {
  const TileConfig config;
  __asm__ volatile("" : : "r"(&config) : "memory");  // gcc 12 believes only 8 bytes of it are read
  _tile_loadconfig(&config);
}

void leave() { _tile_release(); }

// A quarter of the next pair of weight tiles, in good time. Spread between
// the tile instructions, because a bunch of prefetches would fill the load buffers and stall.
template <bool Fetch>
CHILIAD_INLINE void fetch(const std::byte* b, int quarter) {
  constexpr int kAhead = 2048;  // bytes, measured: 1 to 3 KB are equal, more is worse
  if constexpr (Fetch)
    for (int line = 0; line < 512; line += 64) _mm_prefetch(b + kAhead + quarter * 512 + line, _MM_HINT_T1);
}

// Up to 32 rows: c[32][32] = tiles (a0, a1) * panel. Fetch: the panel comes from memory.
template <bool Two, bool Fetch>
void gemm_amx(const std::byte* a0, const std::byte* a1, const std::byte* b, int k_padded, float* c) {
  _tile_zero(0);
  _tile_zero(1);
  if (Two) _tile_zero(2);
  if (Two) _tile_zero(3);
  for (int k = 0; k < k_padded; k += 32, a0 += 1024, a1 += 1024, b += 2048) {
    _tile_loadd(4, a0, 64);
    _tile_loadd(6, b, 64);
    fetch<Fetch>(b, 0);
    _tile_dpbf16ps(0, 4, 6);
    fetch<Fetch>(b, 1);
    _tile_loadd(7, b + 1024, 64);
    _tile_dpbf16ps(1, 4, 7);
    fetch<Fetch>(b, 2);
    if (Two) _tile_loadd(5, a1, 64);
    if (Two) _tile_dpbf16ps(2, 5, 6);
    fetch<Fetch>(b, 3);
    if (Two) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kPanel * 4);
  _tile_stored(1, c + 16, kPanel * 4);
  if (Two) _tile_stored(2, c + 16 * kPanel, kPanel * 4);
  if (Two) _tile_stored(3, c + 16 * kPanel + 16, kPanel * 4);
}

#else

void enter() {}
void leave() {}

#endif

// c[rows][32] for up to 16 rows of one input tile.
void gemm_tile(const ProjectPlan& plan, const std::byte* tile, const std::byte* panel, int rows, float* c) {
  const bool f32 = plan.dtype == DType::float32;
  const float* a = reinterpret_cast<const float*>(tile);
  const float* b = reinterpret_cast<const float*>(panel);
  const std::size_t lda = f32 ? plan.in_features : plan.k_padded;
  auto pass = [&]<int R>(int r) {
    if (f32)
      gemm_f32<R>(a + r * lda, lda, b, plan.in_features, c + r * kPanel);
    else
      gemm_bf16<R>(kBf16Tiles ? tile + r * 64 : tile + r * lda * 4, panel, plan.k_padded, c + r * kPanel);
  };
  int r = 0;
  for (; r + kRows <= rows; r += kRows) pass.template operator()<kRows>(r);
  if constexpr (kRows > 4)
    for (; r + 4 <= rows; r += 4) pass.template operator()<4>(r);
  if constexpr (kRows > 2)
    for (; r + 2 <= rows; r += 2) pass.template operator()<2>(r);
  for (; r < rows; ++r) pass.template operator()<1>(r);
}

// c[rows][32] for up to 32 rows from `row` (a multiple of 16), with the inputs of projection p.
void gemm(const ProjectPlan& plan, int p, int row, int rows, const std::byte* panel, [[maybe_unused]] bool fetch, float* c) {
  const int row_tiles = (plan.rows + kRowTile - 1) / kRowTile;
  const std::byte* const* tiles = plan.tiles + p * row_tiles + row / kRowTile;
#if defined(__AMX_BF16__)
  if (plan.dtype == DType::bfloat16) {
    const bool two = rows > kRowTile;
    auto* call = two ? (fetch ? gemm_amx<true, true> : gemm_amx<true, false>)
                     : (fetch ? gemm_amx<false, true> : gemm_amx<false, false>);
    return call(tiles[0], tiles[two], panel, plan.k_padded, c);
  }
#endif
  gemm_tile(plan, tiles[0], panel, rows < kRowTile ? rows : kRowTile, c);
  if (rows > kRowTile) gemm_tile(plan, tiles[1], panel, rows - kRowTile, c + kRowTile * kPanel);
}

// c[R][16] += z[R][rank] * B[rank][columns of one block]
template <class T, int R, bool Whole>
void expand(const Use& use, const std::uint8_t* arena, int column, int width, const float* z, float* c) {
  Vec sum[R][kVecs];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v] = vload(c + r * kPanel + v * kLanes);
  for (int j = 0; j < use.rank; ++j) {
    const T* b = reinterpret_cast<const T*>(arena + use.b[j]) + column;
    for (int v = 0; v < kVecs; ++v) {
      const int left = width - v * kLanes;
      const Vec w = Whole || left >= kLanes ? vload(b + v * kLanes) : left > 0 ? vload(b + v * kLanes, left) : vset(0.0f);
      for (int r = 0; r < R; ++r) sum[r][v] = vfma(vset(z[r * use.rank + j]), w, sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVecs; ++v) vstore(c + r * kPanel + v * kLanes, sum[r][v]);
}

template <class T>
void apply(const Use& use, const std::uint8_t* arena, int column, int width, int first, int rows, float* c) {
  if (use.g || use.c) {
    const T* g = use.g ? reinterpret_cast<const T*>(use.g) + column : nullptr;
    const T* add = use.c ? reinterpret_cast<const T*>(use.c) + column : nullptr;
    for (int v = 0; v < kVecs; ++v) {
      const int left = width - v * kLanes < kLanes ? width - v * kLanes : kLanes;
      if (left <= 0) break;
      for (int r = 0; r < rows; ++r) {
        Vec y = vload(c + r * kPanel + v * kLanes);
        if (g) y = y * vload(g + v * kLanes, left);
        if (add) y = y + vload(add + v * kLanes, left);
        vstore(c + r * kPanel + v * kLanes, y);
      }
    }
  }
  if (use.rank == 0) return;
  const float* z = use.z + static_cast<std::size_t>(first - use.start) * use.rank;
  int r = 0;
  if (width == kBlock) {
    for (; r + 4 <= rows; r += 4) expand<T, 4, true>(use, arena, column, width, z + r * use.rank, c + r * kPanel);
    for (; r < rows; ++r) expand<T, 1, true>(use, arena, column, width, z + r * use.rank, c + r * kPanel);
  }
  for (; r < rows; ++r) expand<T, 1, false>(use, arena, column, width, z + r * use.rank, c + r * kPanel);
}

CHILIAD_INLINE Vec activate(Activation activation, Vec x) {
  switch (activation) {
    case Activation::silu_mul: return vsilu(x);
    case Activation::gelu_tanh_mul:
    case Activation::gelu_tanh: return vgelu_tanh(x);
    case Activation::gelu: return vgelu(x);
    case Activation::none: break;
  }
  return x;
}

// Everything after the GEMM, on c[rows][32]; then the result goes to y.
void epilogue(const ProjectPlan& plan, int panel, int row, int rows, float* c) {
  const Block* blocks = plan.blocks + 2 * panel;
  for (int i = 0; i < 2; ++i) {
    const Block& block = blocks[i];
    if (block.width == 0) continue;
    float* ci = c + i * kBlock;
    const float* bias = plan.bias + panel * kPanel + i * kBlock;
    for (int v = 0; v < kVecs; ++v) {
      const Vec b = vload(bias + v * kLanes);
      for (int r = 0; r < rows; ++r) {
        float* p = ci + r * kPanel + v * kLanes;
        vstore(p, vload(p) + b);
      }
    }
    const Use* end = plan.uses + plan.uses_from[block.projection + 1];
    for (const Use* use = find_use(plan, block.projection, row); use < end && use->start < row + rows; ++use) {
      const int first = use->start > row ? use->start : row;
      const int last = use->stop < row + rows ? use->stop : row + rows;
      float* cu = ci + (first - row) * kPanel;
      if (use->dtype == DType::bfloat16)
        apply<bf16>(*use, plan.arena, block.column, block.width, first, last - first, cu);
      else
        apply<float>(*use, plan.arena, block.column, block.width, first, last - first, cu);
    }
  }
  const bool pair = plan.activation == Activation::silu_mul || plan.activation == Activation::gelu_tanh_mul;
  for (int i = 0; i < (pair ? 1 : 2); ++i) {
    const Block& block = blocks[i];
    for (int v = 0; v < kVecs; ++v) {
      const int left = block.width - v * kLanes < kLanes ? block.width - v * kLanes : kLanes;
      if (left <= 0) break;
      for (int r = 0; r < rows; ++r) {
        const float* p = c + r * kPanel + i * kBlock + v * kLanes;
        float* y = plan.y + static_cast<std::size_t>(row + r) * plan.y_stride + block.out + v * kLanes;
        Vec value = activate(plan.activation, vload(p));
        if (pair) value = value * vload(p + kBlock);
        if (plan.add) value = value + vload(y, left);
        vstore(y, value, left);
      }
    }
  }
}

void run_panel(const ProjectPlan& plan, int panel, int first, int last, float* c) {
  const int row_tiles = (plan.rows + kRowTile - 1) / kRowTile;
  const Block* blocks = plan.blocks + 2 * panel;
  const int p0 = blocks[0].projection, p1 = blocks[1].width ? blocks[1].projection : p0;
  const std::byte* weights = plan.weights + panel * plan.panel_bytes;
  for (int row = first; row < last; row += 32) {
    const int rows = last - row < 32 ? last - row : 32;
    gemm(plan, p0, row, rows, weights, row == first, c);
    bool same = true;  // do both blocks see the same inputs?
    for (int t = row / kRowTile; p0 != p1 && t <= (row + rows - 1) / kRowTile; ++t)
      same = same && plan.tiles[p0 * row_tiles + t] == plan.tiles[p1 * row_tiles + t];
    if (!same) {
      float* other = c + 32 * kPanel;
      gemm(plan, p1, row, rows, weights, false, other);
      for (int r = 0; r < rows; ++r) std::memcpy(c + r * kPanel + kBlock, other + r * kPanel + kBlock, kBlock * sizeof(float));
    }
    epilogue(plan, panel, row, rows, c);
  }
}

void project(const ProjectPlan& plan) {
  constexpr int kChunk = 128;  // rows per item
  ThreadPool& threads = *plan.threads;
  const int row_tiles = (plan.rows + kRowTile - 1) / kRowTile, chunks = (plan.rows + kChunk - 1) / kChunk;
  const bool prepare = plan.input || plan.norm.kind != NormKind::none || plan.scaled;
  threads.share(0, row_tiles);
  threads.share(1, plan.num_shrinks);
  threads.share(2, plan.num_panels * chunks);
  threads.run([&](int worker) {
    enter();
    if (prepare) {
      for (int i; (i = threads.next(0, worker)) >= 0;) input_tile(plan, i);
      threads.barrier();
    }
    if (plan.num_shrinks) {
      for (int i; (i = threads.next(1, worker)) >= 0;) {
        const ShrinkTask& task = plan.shrinks[i];
        if (task.use->dtype == DType::bfloat16)
          shrink<bf16>(plan, task);
        else
          shrink<float>(plan, task);
      }
      threads.barrier();
    }
    float* c = reinterpret_cast<float*>(plan.work + worker * kWorkBytes);
    for (int i; (i = threads.next(2, worker)) >= 0;) {
      const int first = i % chunks * kChunk;
      run_panel(plan, i / chunks, first, first + kChunk < plan.rows ? first + kChunk : plan.rows, c);
    }
    leave();
  });
}

void norm_rows(ThreadPool& threads, const float* x, int rows, int features, const Norm& norm, float* y, bool add) {
  auto row = [&](std::size_t r) { norm_row(x + r * features, features, norm, y + r * features, add); };
  if (static_cast<std::size_t>(rows) * features < 16384) {
    for (int r = 0; r < rows; ++r) row(r);
    return;
  }
  threads.share(0, rows);
  threads.run([&](int worker) {
    for (int r; (r = threads.next(0, worker)) >= 0;) row(r);
  });
}

}  // namespace

CHILIAD_EXPORT(LinearOps, linear_ops) = {project, norm_rows, kBf16Tiles};

}  // namespace chiliad
