// `project` and `norm` for one instruction set; see linear.h for the layouts.
//
// project runs in three phases, each waiting for the one before:
//   0  inputs: normalise rows, round them, lay them out in tiles
//   1  low rank: z = scale * (A x) for every segment and projection, each rank row read once;
//      with few rows also delta = z B, because walking whole rows of B suits the memory
//   2  panels: base GEMM of a few panels into a small buffer that stays in the L1 cache, then the
//      epilogue on it: bias, g, c, delta (or z B), activation, residual, store.
// At small batches all of it waits for memory, so phases 1 and 2 ask for what comes next
// (prefetch) while they work on what is there.
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

#if defined(__AMX_BF16__)
// Exchange rows and pairs of a bfloat16 input tile: 16 x 16 words of 32 bits. The result is what
// a tile multiplication wants as its right side, so that rank rows can be the left side as they
// lie in the arena.
void turn(const std::byte* tile, std::byte* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(tile + i * 64);
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
    _mm512_store_si512(to + c * 64, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_store_si512(to + (8 + c) * 64, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_store_si512(to + (4 + c) * 64, _mm512_shuffle_i32x4(low2, high2, 0x88));
    _mm512_store_si512(to + (12 + c) * 64, _mm512_shuffle_i32x4(low2, high2, 0xdd));
  }
}
#endif

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
#if defined(__AMX_BF16__)
  if (plan.turned)
    for (int k = 0; k < plan.k_padded; k += 32)
      turn(plan.input + tile * plan.tile_bytes + k * 32, plan.turned + tile * plan.tile_bytes + k * 32);
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
      else if (use->dtype == DType::bfloat16)
        input_row(plan, x + row * n, reinterpret_cast<const bf16*>(d), to, row - first);
      else
        input_row(plan, x + row * n, reinterpret_cast<const float*>(d), to, row - first);
    }
  }
}

// ---- phase 1: low rank ----

// Memory that will be needed soon, fetched line by line between other work.
struct Fetch {
  const std::uint8_t* at = nullptr;
  int lines = 0;
};

// The first of `count` rows at these offsets, as far as they lie back to back (as a rule, all).
Fetch fetch_rows(const std::uint8_t* arena, const std::int64_t* at, int count, int row_bytes) {
  const std::int64_t stride = (row_bytes + 63) / 64 * 64;
  if (count > 0 && at[count - 1] - at[0] != (count - 1) * stride) {
    int n = 1;
    while (at[n] - at[n - 1] == stride) ++n;
    count = n;
  }
  return {arena + at[0], static_cast<int>(count * stride / 64)};
}

CHILIAD_INLINE void fetch_lines(const std::uint8_t*& at, int count) {
  for (int i = 0; i < count; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
  at += 64 * count;
}

// z[rank][R] * B[rank][16 NB columns], summed over ranks in their order, is added to `to` (or
// stored there). Blocks are `step` floats apart, rows `stride`.
template <class T, int R, int NB, bool Add>
void expand(const Use& use, const std::uint8_t* arena, int column, const float* z, float* to, std::size_t stride,
            int step, const std::uint8_t*& ahead, int lines) {
  const int ldz = use.stop - use.start;
  const std::uint8_t* fetched = ahead;
  Vec sum[R][NB][kVecs];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < NB; ++b)
      for (int v = 0; v < kVecs; ++v) sum[r][b][v] = vset(0.0f);
  for (int j = 0; j < use.rank; ++j) {
    if (!Add) fetch_lines(fetched, lines);
    const T* row = reinterpret_cast<const T*>(arena + use.b[j]) + column;
    for (int b = 0; b < NB; ++b)
      for (int v = 0; v < kVecs; ++v) {
        const Vec w = vload(row + b * kBlock + v * kLanes);
        for (int r = 0; r < R; ++r) sum[r][b][v] = vfma(vset(z[static_cast<std::size_t>(j) * ldz + r]), w, sum[r][b][v]);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < NB; ++b)
      for (int v = 0; v < kVecs; ++v) {
        float* p = to + r * stride + b * step + v * kLanes;
        vstore(p, Add ? vload(p) + sum[r][b][v] : sum[r][b][v]);
      }
  ahead = fetched;
}

// The same for a block that is not full.
template <class T, bool Add>
void expand_rest(const Use& use, const std::uint8_t* arena, int column, int width, const float* z, float* to) {
  const int ldz = use.stop - use.start;
  for (int v = 0; v * kLanes < width; ++v) {
    const int left = width - v * kLanes < kLanes ? width - v * kLanes : kLanes;
    Vec sum = vset(0.0f);
    for (int j = 0; j < use.rank; ++j) {
      const T* row = reinterpret_cast<const T*>(arena + use.b[j]) + column + v * kLanes;
      sum = vfma(vset(z[static_cast<std::size_t>(j) * ldz]), vload(row, left), sum);
    }
    float* p = to + v * kLanes;
    vstore(p, Add ? vload(p, left) + sum : sum, left);
  }
}

// `rows` rows from row `first`, `count` full blocks and `rest` columns.
template <class T, bool Add>
void expand_blocks(const Use& use, const std::uint8_t* arena, int column, int count, int rest, int first, int rows,
                   float* to, std::size_t stride, int step, Fetch next) {
  constexpr int kMany = 8 / kVecs > 1 ? 8 / kVecs : 1;   // blocks at once for one row
  constexpr int kFew = kMany > 2 ? kMany / 2 : 1;        // and for four
  const float* z = use.z + (first - use.start);
  int lines = 0;
  if (!Add) {
    const int passes = ((count + kMany - 1) / kMany) * use.rank;
    lines = passes ? (next.lines + passes - 1) / passes : 0;
  }
  int r = 0;
  auto pass = [&]<int R, int NB>(int& b) {
    for (; b + NB <= count; b += NB)
      expand<T, R, NB, Add>(use, arena, column + b * kBlock, z + r, to + r * stride + b * step, stride, step, next.at, lines);
  };
  for (; r + 4 <= rows; r += 4) {
    int b = 0;
    if constexpr (kFew > 2) pass.template operator()<4, kFew>(b);
    if constexpr (kFew > 1) pass.template operator()<4, 2>(b);
    pass.template operator()<4, 1>(b);
  }
  for (; r < rows; ++r) {
    int b = 0;
    if constexpr (kMany > 4) pass.template operator()<1, kMany>(b);
    if constexpr (kMany > 2) pass.template operator()<1, 4>(b);
    if constexpr (kMany > 1) pass.template operator()<1, 2>(b);
    pass.template operator()<1, 1>(b);
  }
  if (rest)
    for (r = 0; r < rows; ++r)
      expand_rest<T, Add>(use, arena, column + count * kBlock, rest, z + r, to + r * stride + count * step);
}

// Rows of x for shrink: bfloat16 rank rows of a linear that rounds its input see the rounded
// input, from its tiles; others see x as it is.
struct PlainRows {
  const float* x;
  std::size_t stride;
  const float* row(int r) const { return x + r * stride; }
  static const float* at(const float* row, int k) { return row + k; }
};

struct TileRows {
  const std::byte* input;
  std::size_t tile_bytes;
  const bf16* row(int r) const {
    return reinterpret_cast<const bf16*>(input + r / kRowTile * tile_bytes + r % kRowTile * 64);
  }
  static const bf16* at(const bf16* row, int k) { return row + k / 32 * 512 + k % 32; }
};

// z[j][r] = scale[j] * (x_r . a_j). One vector of partial sums per output, added up at the end:
// the order of additions does not depend on R and J.
template <class T, int R, int J, class X>
void dots(const std::uint8_t* arena, const std::int64_t* at, const X& x, int first, int n, const float* scale, float* z, int ldz) {
  const T* a[J];
  for (int j = 0; j < J; ++j) a[j] = reinterpret_cast<const T*>(arena + at[j]);
  decltype(x.row(0)) row[R];
  for (int r = 0; r < R; ++r) row[r] = x.row(first + r);
  Vec sum[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) sum[r][j] = vset(0.0f);
  const int whole = n / kLanes * kLanes;
  for (int k = 0; k < whole; k += kLanes) {
    Vec xs[R];
    for (int r = 0; r < R; ++r) xs[r] = vload(X::at(row[r], k));
    for (int j = 0; j < J; ++j) {
      const Vec v = vload(a[j] + k);
      for (int r = 0; r < R; ++r) sum[r][j] = vfma(v, xs[r], sum[r][j]);
    }
  }
  if (whole < n)
    for (int j = 0; j < J; ++j) {
      const Vec v = vload(a[j] + whole, n - whole);
      for (int r = 0; r < R; ++r) sum[r][j] = vfma(v, vload(X::at(row[r], whole), n - whole), sum[r][j]);
    }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) z[j * ldz + r] = vsum(sum[r][j]) * scale[j];
}

template <class T, class X>
void shrink(const ProjectPlan& plan, const Task& task, const X& x) {
  constexpr int kJ = kLanes == 16 ? 4 : 2;
  const Use& use = *task.use;
  const int ldz = use.stop - use.start;
  auto pass = [&]<int R, int J>(int row, int j) {
    float* z = use.z + static_cast<std::size_t>(j) * ldz + (row - use.start);
    dots<T, R, J>(plan.arena, use.a + j, x, row, plan.in_features, use.scale + j, z, ldz);
  };
  int row = task.row;
  const int stop = task.row + task.rows;
  for (; row + 4 <= stop; row += 4) {
    int j = 0;
    for (; j + kJ <= use.rank; j += kJ) pass.template operator()<4, kJ>(row, j);
    for (; j < use.rank; ++j) pass.template operator()<4, 1>(row, j);
  }
  for (; row < stop; ++row) {
    int j = 0;
    for (; j + 8 <= use.rank; j += 8) pass.template operator()<1, 8>(row, j);
    for (; j < use.rank; ++j) pass.template operator()<1, 1>(row, j);
  }
}

void shrink_any(const ProjectPlan& plan, const Task& task) {
  const PlainRows plain{plan.x32 ? plan.x32 : plan.x, static_cast<std::size_t>(plan.in_features)};
  if (task.use->dtype == DType::float32) return shrink<float>(plan, task, plain);
  if (plan.dtype == DType::float32) return shrink<bf16>(plan, task, plain);
  if constexpr (kBf16Tiles)
    shrink<bf16>(plan, task, TileRows{plan.input, plan.tile_bytes});
  else
    shrink<bf16>(plan, task, PlainRows{reinterpret_cast<const float*>(plan.input), static_cast<std::size_t>(plan.k_padded)});
}

#if defined(__AMX_BF16__)

// Ranks [rank, rank + 16) times up to 64 rows (4 row tiles). Full sets of ranks at a constant
// distance are multiplied where they lie, others are copied first.
void shrink_tiles(const ProjectPlan& plan, const Task& task, int rank, Fetch next, std::byte* work) {
  const Use& use = *task.use;
  const int ranks = use.rank - rank < 16 ? use.rank - rank : 16;
  const std::int64_t* at = use.a + rank;
  const std::uint8_t* rows = plan.arena + at[0];
  std::int64_t stride = ranks > 1 ? at[1] - at[0] : 0;
  bool in_place = ranks == 16 && plan.in_features % 32 == 0;
  for (int j = 2; in_place && j < 16; ++j) in_place = at[j] - at[j - 1] == stride;
  if (!in_place) {
    stride = std::int64_t{2} * plan.k_padded + 64;  // an odd number of lines: rows spread over the cache
    for (int j = 0; j < ranks; ++j) {
      std::byte* to = work + j * stride;
      std::memcpy(to, plan.arena + at[j], std::size_t{2} * plan.in_features);
      std::memset(to + 2 * plan.in_features, 0, std::size_t{2} * (plan.k_padded - plan.in_features));
    }
    rows = reinterpret_cast<const std::uint8_t*>(work);
  }
  const int first = task.row / kRowTile, tiles = (task.row + task.rows - 1) / kRowTile - first + 1;
  const std::size_t tile_bytes = std::size_t{32} * plan.k_padded;
  const std::byte* x = plan.turned + first * tile_bytes;
  const int steps = plan.k_padded / 32, lines = (next.lines + steps - 1) / steps;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < plan.k_padded; k += 32, x += 1024) {
    _tile_loadd(4, rows + 2 * k, stride);
    _tile_loadd(5, x, 64);
    _tile_dpbf16ps(0, 4, 5);
    fetch_lines(next.at, lines);
    if (tiles == 1) continue;
    _tile_loadd(6, x + tile_bytes, 64);
    _tile_dpbf16ps(1, 4, 6);
    if (tiles == 2) continue;
    _tile_loadd(5, x + 2 * tile_bytes, 64);
    _tile_dpbf16ps(2, 4, 5);
    if (tiles == 3) continue;
    _tile_loadd(6, x + 3 * tile_bytes, 64);
    _tile_dpbf16ps(3, 4, 6);
  }
  alignas(64) float sums[4][16][16];
  _tile_stored(0, sums[0], 64);
  if (tiles > 1) _tile_stored(1, sums[1], 64);
  if (tiles > 2) _tile_stored(2, sums[2], 64);
  if (tiles > 3) _tile_stored(3, sums[3], 64);
  const int ldz = use.stop - use.start;
  for (int t = 0; t < tiles; ++t) {
    const int start = (first + t) * kRowTile;  // of the tile; its valid rows are [low, high)
    const int low = task.row > start ? task.row - start : 0;
    const int high = task.row + task.rows < start + kRowTile ? task.row + task.rows - start : kRowTile;
    const __mmask16 mask = static_cast<__mmask16>(((1u << high) - 1) & ~((1u << low) - 1));
    for (int j = 0; j < ranks; ++j) {
      float* z = use.z + static_cast<std::size_t>(rank + j) * ldz + (start - use.start);
      _mm512_mask_storeu_ps(z, mask, _mm512_load_ps(sums[t][j]) * vset(use.scale[rank + j]));
    }
  }
}

#endif

Fetch fetch_a(const ProjectPlan& plan, const Use& use, int rank) {
  const int rows = use.rank - rank < 16 ? use.rank - rank : 16;
  return fetch_rows(plan.arena, use.a + rank, rows, plan.in_features * item_bytes(use.dtype));
}

// The low rank part of one use, for some of its rows: z, and z B if it is wanted now. While it
// works on one stretch of memory (16 rows of A, B, the next task's A) it fetches the next.
void low_rank(const ProjectPlan& plan, const Task& task, const Task* after, [[maybe_unused]] std::byte* work) {
  const Use& use = *task.use;
  Fetch b;
  if (plan.delta) b = fetch_rows(plan.arena, use.b, use.rank, use.size * item_bytes(use.dtype));
#if defined(__AMX_BF16__)
  if (plan.turned && use.dtype == DType::bfloat16) {
    for (int rank = 0; rank < use.rank; rank += 16) {
      const Fetch next = rank + 16 < use.rank ? fetch_a(plan, use, rank + 16) : b;
      shrink_tiles(plan, task, rank, next, work);
    }
  } else
#endif
    shrink_any(plan, task);
  if (!plan.delta) return;
  Fetch next;
  if (after) next = fetch_a(plan, *after->use, 0);
  float* to = plan.delta + static_cast<std::size_t>(task.row) * plan.out_features + use.first;
  const int count = use.size / kBlock, rest = use.size % kBlock;
  if (use.dtype == DType::bfloat16)
    expand_blocks<bf16, false>(use, plan.arena, 0, count, rest, task.row, task.rows, to, plan.out_features, kBlock, next);
  else
    expand_blocks<float, false>(use, plan.arena, 0, count, rest, task.row, task.rows, to, plan.out_features, kBlock, next);
}

// ---- phase 2: weights stored in fewer bits ----

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

// One tile of int4: 16 rows of 32 elements, times the scale of their column.
void unpack_int4(const std::byte* from, bf16* to) {
#if defined(__AVX512F__)
  const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 256)));
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512 low_scale = _mm512_permutexvar_ps(twice, scale);
  const __m512 high_scale = _mm512_permutexvar_ps(_mm512_add_epi32(twice, _mm512_set1_epi32(8)), scale);
  const __m512 levels = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  for (int i = 0; i < 16; ++i, to += 32) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i)));
    const __m512 low = _mm512_permutexvar_ps(bytes, levels) * low_scale;  // looks at 4 bits only
    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), levels) * high_scale;
#if defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(to, &both, 64);
#else
    vstore_bf16(to, low);
    vstore_bf16(to + 16, high);
#endif
  }
#else
  float scale[32];
  for (int n = 0; n < 16; ++n) {
    std::uint16_t h;
    std::memcpy(&h, from + 256 + 2 * n, 2);
    scale[2 * n] = scale[2 * n + 1] = half_to_float(h);
  }
  for (int i = 0; i < 16; ++i, to += 32) {
    std::int8_t level[32];
    for (int e = 0; e < 16; ++e) {
      const int byte = static_cast<int>(from[16 * i + e]);
      level[e] = static_cast<std::int8_t>((byte & 15) - 8);
      level[16 + e] = static_cast<std::int8_t>((byte >> 4) - 8);
    }
    for (int e = 0; e < 32; e += kLanes) vstore_bf16(to + e, vload(level + e) * vload(scale + e));
  }
#endif
}

// One tile of int8: 16 rows of 16 even, then 16 odd elements. Whole numbers up to 127 are exact.
void unpack_int8(const std::byte* from, bf16* to) {
  const auto* p = reinterpret_cast<const std::int8_t*>(from);
#if defined(__AVX512F__)
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int i = 0; i < 16; ++i, p += 32, to += 32) {
    const __m512i even = _mm512_srli_epi32(_mm512_castps_si512(vload(p)), 16);
    const __m512i odd = _mm512_castps_si512(vload(p + 16));
    _mm512_store_si512(to, _mm512_ternarylogic_epi32(upper, odd, even, 0xea));  // (upper & odd) | even
  }
#else
  for (int i = 0; i < 16; ++i, p += 32)
    for (int n = 0; n < 16; ++n) {
      *to++ = to_bf16(p[n]);
      *to++ = to_bf16(p[16 + n]);
    }
#endif
}

// Tiles 2 step and 2 step + 1 of a panel. What is needed a little later is fetched.
CHILIAD_INLINE void unpack_pair(DType dtype, const std::byte* panel, int step, std::byte* to) {
  const int bytes = 2 * (dtype == DType::int4 ? kInt4Tile : 512), half = bytes / 2;
  const std::byte* from = panel + static_cast<std::size_t>(step) * bytes;
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + 2048 + line, 0, 2);
  for (int i = 0; i < 2; ++i)
    if (dtype == DType::int4)
      unpack_int4(from + i * half, reinterpret_cast<bf16*>(to) + i * 512);
    else
      unpack_int8(from + i * half, reinterpret_cast<bf16*>(to) + i * 512);
}

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
    for (int v = 0; v < 2; ++v) vstore(c + r * kStride + v * kLanes, sum[r][v]);
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

// A quarter of the pair of weight tiles that comes next, every other line (the L2 cache fetches
// lines in pairs). Spread between the tile instructions, because a bunch of prefetches would fill
// the load buffers and stall; and close, because further away only these few buffers (and not
// the L2 cache's own prefetcher) would do the work.
CHILIAD_INLINE void fetch(const std::byte* b, int quarter) {
  constexpr int kAhead = 2048;  // bytes, measured: 1 to 3 KB are equal, more is worse
  for (int line = 0; line < 512; line += 128) _mm_prefetch(b + kAhead + quarter * 512 + line, _MM_HINT_T1);
}

// Up to 32 rows: c[32][32] = tiles (a0, a1) * panel. First: the panel comes from memory; else it
// stays in the L1 cache, which the inputs are read past.
template <bool Two, bool First>
void gemm_amx(const std::byte* a0, const std::byte* a1, const std::byte* b, int k_padded, float* c) {
  _tile_zero(0);
  _tile_zero(1);
  if (Two) _tile_zero(2);
  if (Two) _tile_zero(3);
  for (int k = 0; k < k_padded; k += 32, a0 += 1024, a1 += 1024, b += 2048) {
    if (First) _tile_loadd(4, a0, 64);
    else _tile_stream_loadd(4, a0, 64);
    _tile_loadd(6, b, 64);
    if (First) fetch(b, 0);
    _tile_dpbf16ps(0, 4, 6);
    if (First) fetch(b, 1);
    _tile_loadd(7, b + 1024, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (First) fetch(b, 2);
    if (Two && First) _tile_loadd(5, a1, 64);
    if (Two && !First) _tile_stream_loadd(5, a1, 64);
    if (Two) _tile_dpbf16ps(2, 5, 6);
    if (First) fetch(b, 3);
    if (Two) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kStride * 4);
  _tile_stored(1, c + 16, kStride * 4);
  if (Two) _tile_stored(2, c + 16 * kStride, kStride * 4);
  if (Two) _tile_stored(3, c + 16 * kStride + 16, kStride * 4);
}

// The same with weights to unpack: multiply step k - 2 while step k is unpacked, so that neither
// memory nor the tile unit waits. Keep: leave the whole panel in room (else it is a ring).
template <bool Two, bool Keep>
void gemm_amx_unpack(DType dtype, const std::byte* a0, const std::byte* a1, const std::byte* panel, std::byte* room,
                     int k_padded, float* c) {
  constexpr int kLag = 2, kMask = Keep ? -1 : 3;
  const int steps = k_padded / 32;
  _tile_zero(0);
  _tile_zero(1);
  if (Two) _tile_zero(2);
  if (Two) _tile_zero(3);
  for (int k = 0; k < steps + kLag; ++k) {
    if (k < steps) unpack_pair(dtype, panel, k, room + (k & kMask) * 2048);
    if (k < kLag) continue;
    const std::byte* b = room + ((k - kLag) & kMask) * 2048;
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
      gemm_f32<R>(a + r * lda, lda, b, plan.in_features, c + r * kStride);
    else
      gemm_bf16<R>(kBf16Tiles ? tile + r * 64 : tile + r * lda * 4, panel, plan.k_padded, c + r * kStride);
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
  memory,    // as bfloat16 or float32, for the first time: fetch ahead
  cache,     // as bfloat16 or float32
  packed,    // int8 or int4, for the only time
  unpacked,  // int8 or int4, for the first time: leave the unpacked panel in `room`
};

// c[rows][32] for up to 32 rows from `row` (a multiple of 16), with the inputs of projection p.
void gemm(const ProjectPlan& plan, int p, int row, int rows, const std::byte* panel, Source source, std::byte* room, float* c) {
  const int row_tiles = (plan.rows + kRowTile - 1) / kRowTile;
  const std::byte* const* tiles = plan.tiles + p * row_tiles + row / kRowTile;
#if defined(__AMX_BF16__)
  if (plan.dtype != DType::float32) {
    const bool two = rows > kRowTile;
    if (source == Source::memory || source == Source::cache) {
      const bool fetch = source == Source::memory;
      auto* call = two ? (fetch ? gemm_amx<true, true> : gemm_amx<true, false>)
                       : (fetch ? gemm_amx<false, true> : gemm_amx<false, false>);
      return call(tiles[0], tiles[two], panel, plan.k_padded, c);
    }
    const bool keep = source == Source::unpacked;
    auto* call = two ? (keep ? gemm_amx_unpack<true, true> : gemm_amx_unpack<true, false>)
                     : (keep ? gemm_amx_unpack<false, true> : gemm_amx_unpack<false, false>);
    return call(plan.dtype, tiles[0], tiles[two], panel, room, plan.k_padded, c);
  }
#endif
  if (source == Source::packed || source == Source::unpacked) {
    for (int step = 0; step < plan.k_padded / 32; ++step) unpack_pair(plan.dtype, panel, step, room + step * 2048);
    panel = room;
  }
  gemm_tile(plan, tiles[0], panel, rows < kRowTile ? rows : kRowTile, c);
  if (rows > kRowTile) gemm_tile(plan, tiles[1], panel, rows - kRowTile, c + kRowTile * kStride);
}

// ---- phase 2: epilogue ----

// What one use does to `count` neighbouring blocks (full ones, or a single one of `width`
// columns) of rows [first, first + rows); c points at them.
template <class T>
void apply(const ProjectPlan& plan, const Use& use, const Block& block, int count, int step, int first, int rows, float* c) {
  if (use.g || use.c)
    for (int b = 0; b < count; ++b)
      for (int v = 0; v * kLanes < block.width; ++v) {
        const int left = block.width - v * kLanes < kLanes ? block.width - v * kLanes : kLanes;
        const int at = block.column + b * kBlock + v * kLanes;
        for (int r = 0; r < rows; ++r) {
          float* p = c + r * kStride + b * step + v * kLanes;
          Vec y = vload(p);
          if (use.g) y = y * vload(reinterpret_cast<const T*>(use.g) + at, left);
          if (use.c) y = y + vload(reinterpret_cast<const T*>(use.c) + at, left);
          vstore(p, y);
        }
      }
  if (use.rank == 0) return;
  if (!plan.delta) {
    const bool full = block.width == kBlock;
    expand_blocks<T, true>(use, plan.arena, block.column, full ? count : 0, full ? 0 : block.width, first, rows, c, kStride, step, {});
    return;
  }
  for (int r = 0; r < rows; ++r) {
    const float* delta = plan.delta + static_cast<std::size_t>(first + r) * plan.out_features + block.out;
    for (int b = 0; b < count; ++b)
      for (int v = 0; v < kVecs; ++v) {  // what lies beyond `width` is never stored
        float* p = c + r * kStride + b * step + v * kLanes;
        vstore(p, vload(p) + vload(delta + b * kBlock + v * kLanes));
      }
  }
}

void apply_uses(const ProjectPlan& plan, const Block& block, int count, int step, int row, int rows, float* c) {
  const Use* end = plan.uses + plan.uses_from[block.projection + 1];
  for (const Use* use = find_use(plan, block.projection, row); use < end && use->start < row + rows; ++use) {
    const int first = use->start > row ? use->start : row;
    const int last = use->stop < row + rows ? use->stop : row + rows;
    float* cu = c + (first - row) * kStride;
    if (use->dtype == DType::bfloat16)
      apply<bf16>(plan, *use, block, count, step, first, last - first, cu);
    else
      apply<float>(plan, *use, block, count, step, first, last - first, cu);
  }
}

// The last step of the epilogue: activation, residual, and c goes to y.
template <Activation A, bool Add>
void finish(const ProjectPlan& plan, const Block* blocks, int count, int row, int rows, const float* c) {
  constexpr bool kPair = A == Activation::silu_mul || A == Activation::gelu_tanh_mul;
  const bool add = Add || plan.add;
  for (int r = 0; r < rows; ++r, c += kStride) {
    float* y_row = plan.y + static_cast<std::size_t>(row + r) * plan.y_stride;
    for (int i = 0; i < count; i += kPair ? 2 : 1) {
      const int width = blocks[i].width;
      float* y = y_row + blocks[i].out;
      for (int v = 0; v < kVecs; ++v) {
        const float* p = c + i * kBlock + v * kLanes;
        Vec value = vload(p);
        if constexpr (A == Activation::silu_mul) value = vsilu(value);
        if constexpr (A == Activation::gelu_tanh_mul || A == Activation::gelu_tanh) value = vgelu_tanh(value);
        if constexpr (A == Activation::gelu) value = vgelu(value);
        if constexpr (kPair) value = value * vload(p + kBlock);
        if (width == kBlock) {
          vstore(y + v * kLanes, add ? value + vload(y + v * kLanes) : value);
        } else if (const int left = width - v * kLanes; left > 0) {
          const int n = left < kLanes ? left : kLanes;
          vstore(y + v * kLanes, add ? value + vload(y + v * kLanes, n) : value, n);
        }
      }
    }
  }
}

// Everything after the GEMM, on c[rows][32 panels]; then the result goes to y.
void epilogue(const ProjectPlan& plan, int panel, int panels, int row, int rows, float* c) {
  const Block* blocks = plan.blocks + 2 * panel;
  const int count = 2 * panels;
  if (plan.scale || plan.bias)
    for (int i = 0; i < count * kBlock; i += kLanes) {
      const Vec scale = plan.scale ? vload(plan.scale + panel * kPanel + i) : vset(1.0f);
      const Vec bias = plan.bias ? vload(plan.bias + panel * kPanel + i) : vset(0.0f);
      for (int r = 0; r < rows; ++r) {
        float* p = c + r * kStride + i;
        vstore(p, vfma(vload(p), scale, bias));
      }
    }
  // runs of full blocks of one projection: neighbours, or every other one where they alternate
  const int every = plan.paired ? 2 : 1;
  if (plan.uses_from[plan.num_projections] > 0)
    for (int s = 0; s < every; ++s)
      for (int i = s; i < count;) {
        int j = i + every;
        while (blocks[i].width == kBlock && j < count && blocks[j].width == kBlock && blocks[j].projection == blocks[i].projection)
          j += every;
        if (blocks[i].width) apply_uses(plan, blocks[i], (j - i) / every, every * kBlock, row, rows, c + i * kBlock);
        i = j;
      }
  const bool add = plan.add;
  switch (plan.activation) {
    case Activation::none: return add ? finish<Activation::none, true>(plan, blocks, count, row, rows, c)
                                      : finish<Activation::none, false>(plan, blocks, count, row, rows, c);
    case Activation::silu_mul: return finish<Activation::silu_mul, false>(plan, blocks, count, row, rows, c);
    case Activation::gelu_tanh_mul: return finish<Activation::gelu_tanh_mul, false>(plan, blocks, count, row, rows, c);
    case Activation::gelu_tanh: return finish<Activation::gelu_tanh, false>(plan, blocks, count, row, rows, c);
    case Activation::gelu: return finish<Activation::gelu, false>(plan, blocks, count, row, rows, c);
  }
}

// Panels [panel, panel + panels) of rows [first, last). With weights to unpack, several panels
// only if the rows fit one pass.
void run_panels(const ProjectPlan& plan, int panel, int panels, int first, int last, std::byte* work) {
  const int row_tiles = (plan.rows + kRowTile - 1) / kRowTile;
  const bool stored = plan.dtype == DType::float32 || plan.dtype == DType::bfloat16;
  float* c = reinterpret_cast<float*>(work);
  float* other = c + 32 * kStride;
  std::byte* room = work + 2 * 32 * kStride * sizeof(float);
  for (int row = first; row < last; row += 32) {
    const int rows = last - row < 32 ? last - row : 32;
    for (int i = 0; i < panels; ++i) {
      const Block* blocks = plan.blocks + 2 * (panel + i);
      const int p0 = blocks[0].projection, p1 = blocks[1].width ? blocks[1].projection : p0;
      const std::byte* weights = plan.weights + (panel + i) * plan.panel_bytes;
      Source source = stored ? (row == 0 ? Source::memory : Source::cache) : last - first > 32 ? Source::unpacked : Source::packed;
      if (!stored && row > first) source = Source::cache, weights = room;
      gemm(plan, p0, row, rows, weights, source, room, c + i * kPanel);
      bool same = true;  // do both blocks see the same inputs?
      for (int t = row / kRowTile; p0 != p1 && t <= (row + rows - 1) / kRowTile; ++t)
        same = same && plan.tiles[p0 * row_tiles + t] == plan.tiles[p1 * row_tiles + t];
      if (!same) {
        gemm(plan, p1, row, rows, weights, stored ? Source::cache : source, room, other);
        for (int r = 0; r < rows; ++r)
          std::memcpy(c + r * kStride + i * kPanel + kBlock, other + r * kStride + kBlock, kBlock * sizeof(float));
      }
    }
    epilogue(plan, panel, panels, row, rows, c);
  }
}

// Rows per item: all if there are panels enough for the threads.
int chunk_rows(const ProjectPlan& plan) {
  constexpr int kMost = 512;
  const int wanted = 4 * plan.threads->size(), chunks = (wanted + plan.num_panels - 1) / plan.num_panels;
  int rows = (plan.rows + chunks - 1) / chunks;
  rows = rows < 32 ? 32 : (rows + 31) / 32 * 32;
  return rows < kMost ? rows : kMost;
}

// While it waits for the next call, the worker reads the start of its share of the weights that
// will probably come then.
void read_ahead(const ProjectPlan& plan, int worker) {
  constexpr std::size_t kMost = 256 * 1024;  // what a gap of some 15 us can read
  const Following* next = plan.following;
  if (!next || !next->weights) return plan.threads->read_ahead(worker, nullptr, 0);
  const std::int64_t panels = next->num_panels, size = plan.threads->size();
  const std::int64_t first = panels * worker / size, last = panels * (worker + 1) / size;
  const std::size_t bytes = static_cast<std::size_t>(last - first) * next->panel_bytes;
  plan.threads->read_ahead(worker, next->weights.get() + first * next->panel_bytes, (bytes < kMost ? bytes : kMost) / 1024 * 1024);
}

void project(const ProjectPlan& plan) {
  ThreadPool& threads = *plan.threads;
  const int row_tiles = (plan.rows + kRowTile - 1) / kRowTile, chunk = chunk_rows(plan);
  const int chunks = (plan.rows + chunk - 1) / chunk;
  const bool prepare = plan.input || plan.norm.kind != NormKind::none || plan.scaled;
  const int most = plan.rows <= 32 ? kGroup : 1;  // a panel that serves many rows stays in the L1 cache
  threads.share(0, row_tiles);
  threads.share(1, plan.num_tasks);
  threads.share(2, plan.num_panels * chunks);
  threads.run([&](int worker) {
    std::byte* work = plan.work + worker * plan.work_bytes;
    enter();
    if (prepare) {
      for (int i; (i = threads.next(0, worker)) >= 0;) input_tile(plan, i);
      threads.wait(0);
    }
    if (plan.num_tasks) {
      while (const ThreadPool::Run run = threads.take(1, worker, 4))
        for (int i = run.first; i < run.last; ++i)
          low_rank(plan, plan.tasks[i], i + 1 < plan.num_tasks ? &plan.tasks[i + 1] : nullptr, work);
      threads.wait(1);
    }
    while (const ThreadPool::Run run = threads.take(2, worker, most))
      for (int i = run.first; i < run.last;) {  // item = chunk of rows, panel
        const int panel = i % plan.num_panels, first = i / plan.num_panels * chunk;
        int panels = plan.num_panels - panel;
        if (panels > run.last - i) panels = run.last - i;
        run_panels(plan, panel, panels, first, first + chunk < plan.rows ? first + chunk : plan.rows, work);
        i += panels;
      }
    leave();
    if (worker > 0) read_ahead(plan, worker);
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

CHILIAD_EXPORT(LinearOps, linear_ops) = {project, norm_rows, kBf16Tiles, kAmx};

}  // namespace chiliad
