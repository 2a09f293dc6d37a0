// Phase 1 of a projection: the low rank parts, z = scale * (A x) and, with few rows, delta = z B.
#pragma once

#include "linear_ahead.inl"
#include "linear_inputs.inl"

namespace chiliad {
namespace {

// ---- phase 1: low rank ----

// z[rank][R] * B[rank][16 NB columns], summed over ranks [low, high) in their order, is added to `to`
// (or stored there). With low > 0 `to` holds the sum of those before. Blocks are `step` floats apart,
// rows `stride`. `ahead`: if B is read for the first time, else null (here and below).
template <class T, int R, int NB, bool Add>
void expand(const Use& use, const std::uint8_t* arena, int low, int high, int column, const float* z, float* to,
            std::size_t stride, int step, Ahead* ahead) {
  constexpr int kLines = (NB * kBlock * sizeof(T) + 63) / 64;
  const int ldz = use.stop - use.start;
  Vec sum[R][NB][kVecs];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < NB; ++b)
      for (int v = 0; v < kVecs; ++v)
        sum[r][b][v] = !Add && low > 0 ? vload(to + r * stride + b * step + v * kLanes) : vset(0.0f);
  for (int j = low; j < high; ++j) {
    if (ahead) ahead->fetch(kLines);
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

// `rows` rows from row `first`, `count` full blocks and `rest` columns. What memory has to bring comes a few
// whole ranks at a time: nearly in the order of addresses, which is the order in which it is fetched.
template <class T, bool Add>
void expand_blocks(const Use& use, const std::uint8_t* arena, const float* z, int column, int count, int rest, int first, int rows,
                   float* to, std::size_t stride, int step, Ahead* ahead) {
  constexpr int kMany = 8 / kVecs > 1 ? 8 / kVecs : 1;   // blocks at once for one row
  constexpr int kFew = kMany > 2 ? kMany / 2 : 1;        // and for four
  constexpr int kRanks = 4;
  z += use.z + (first - use.start);
  int r = 0, low = 0, high = use.rank;
  auto pass = [&]<int R, int NB>(int& b) {
    for (; b + NB <= count; b += NB)
      expand<T, R, NB, Add>(use, arena, low, high, column + b * kBlock, z + r, to + r * stride + b * step, stride, step,
                            r ? nullptr : ahead);
  };
  for (; r + 4 <= rows; r += 4) {
    int b = 0;
    if constexpr (kFew > 2) pass.template operator()<4, kFew>(b);
    if constexpr (kFew > 1) pass.template operator()<4, 2>(b);
    pass.template operator()<4, 1>(b);
  }
  for (; r < rows; ++r)
    for (low = 0; low < use.rank; low = high) {
      high = !Add && r == 0 && ahead && low + kRanks < use.rank ? low + kRanks : use.rank;
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

// Rows of x for shrink: bfloat16 and int8 rank rows of a linear that rounds its input see the
// rounded input, from its tiles; others see x as it is.
struct PlainRows {
  using Element = float;
  const float* x;
  std::size_t stride;
  const float* row(int r) const { return x + r * stride; }
  static const float* at(const float* row, int k) { return row + k; }
};

struct TileRows {
  using Element = bf16;
  const std::byte* input;
  std::size_t tile_bytes;
  const bf16* row(int r) const {
    return reinterpret_cast<const bf16*>(input + r / kRowTile * tile_bytes + r % kRowTile * 64);
  }
  static const bf16* at(const bf16* row, int k) { return row + k / 32 * 512 + k % 32; }
};

// How rank rows of T meet inputs of X, kWidth elements at a time.
template <class T, class X>
struct Meet {
  static constexpr int kWidth = kLanes;
  template <class E>
  static Vec load(const E* p) { return vload(p); }
  template <class E>
  static Vec load(const E* p, int n) { return vload(p, n); }
  static Vec add(Vec a, Vec x, Vec sum) { return vfma(a, x, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Meet<bf16, bf16> {
  static constexpr int kWidth = 32;
  static CHILIAD_INLINE __m512bh load(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static CHILIAD_INLINE __m512bh load(const bf16* p, int n) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
  }
  static CHILIAD_INLINE Vec add(__m512bh a, __m512bh x, Vec sum) { return _mm512_dpbf16_ps(sum, a, x); }
};
#endif

// z[j][r] = scale[j] * (x_r . a_j). One vector of partial sums per output, added up at the end:
// the order of additions does not depend on R and J.
template <class T, int R, int J, class X>
void dots(const std::uint8_t* arena, const std::int64_t* at, const X& x, int first, int n, const float* scale, float* z, int ldz,
          Ahead* ahead) {
  using M = Meet<T, typename X::Element>;
  constexpr int kWidth = M::kWidth, kLine = 64 / sizeof(T);
  const T* a[J];
  for (int j = 0; j < J; ++j) a[j] = reinterpret_cast<const T*>(arena + at[j]);
  const typename X::Element* row[R];
  for (int r = 0; r < R; ++r) row[r] = x.row(first + r);
  Vec sum[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) sum[r][j] = vset(0.0f);
  const int whole = n / kWidth * kWidth;
  for (int k = 0; k < whole; k += kWidth) {
    if (ahead && k % kLine == 0) ahead->fetch(J);
    decltype(M::load(row[0])) xs[R];
    for (int r = 0; r < R; ++r) xs[r] = M::load(X::at(row[r], k));
    for (int j = 0; j < J; ++j) {
      const auto v = M::load(a[j] + k);
      for (int r = 0; r < R; ++r) sum[r][j] = M::add(v, xs[r], sum[r][j]);
    }
  }
  if (whole < n)
    for (int j = 0; j < J; ++j) {
      const auto v = M::load(a[j] + whole, n - whole);
      for (int r = 0; r < R; ++r) sum[r][j] = M::add(v, M::load(X::at(row[r], whole), n - whole), sum[r][j]);
    }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) z[j * ldz + r] = vsum(sum[r][j]) * scale[j];
}

// Ranks [rank, stop) of a task.
template <class T, class X>
void shrink(const ProjectPlan& plan, const Task& task, const X& x, int rank, int stop, Ahead& ahead) {
  constexpr int kJ = kLanes == 16 ? 4 : 2;
  const Use& use = *task.use;
  const int ldz = use.stop - use.start;
  auto pass = [&]<int R, int J>(int row, int j) {
    float* z = plan.z + use.z + static_cast<std::size_t>(j) * ldz + (row - use.start);
    dots<T, R, J>(plan.arena, use.a + j, x, row, plan.in_features, use.scale + j, z, ldz, row == task.row ? &ahead : nullptr);
  };
  int row = task.row;
  const int end = task.row + task.rows;
  for (; row + 4 <= end; row += 4) {
    int j = rank;
    for (; j + kJ <= stop; j += kJ) pass.template operator()<4, kJ>(row, j);
    for (; j < stop; ++j) pass.template operator()<4, 1>(row, j);
  }
  for (; row < end; ++row) {
    int j = rank;  // two at a time: nearly in the order of addresses
    for (; j + 2 <= stop; j += 2) pass.template operator()<1, 2>(row, j);
    for (; j < stop; ++j) pass.template operator()<1, 1>(row, j);
  }
}

void shrink_any(const ProjectPlan& plan, const Task& task, int rank, int stop, Ahead& ahead) {
  const PlainRows plain{plan.x32 ? plan.x32 : plan.x, static_cast<std::size_t>(plan.in_features)};
  if (task.use->dtype == DType::float32) return shrink<float>(plan, task, plain, rank, stop, ahead);
  const PlainRows rounded{reinterpret_cast<const float*>(plan.input), static_cast<std::size_t>(plan.k_padded)};
  auto narrow = [&]<class T>() {
    if (plan.dtype == DType::float32)
      shrink<T>(plan, task, plain, rank, stop, ahead);
    else if constexpr (kBf16Tiles)
      shrink<T>(plan, task, TileRows{plan.input, plan.tile_bytes}, rank, stop, ahead);
    else
      shrink<T>(plan, task, rounded, rank, stop, ahead);
  };
  if (task.use->dtype == DType::bfloat16)
    narrow.template operator()<bf16>();
  else
    narrow.template operator()<std::int8_t>();
}

#if CHILIAD_AMX

constexpr int kFewer = 4;  // rows of a task up to which vectors are faster than tiles

// Ranks [rank, stop), at most 16, times R rows by vectors, a rank in each lane. Every sum is added up in the order of
// tdpbf16ps, so that a row does not show who multiplied it: even and odd k of 32 apart, then together, then added to those
// before. x: the task's rows as floats, [R][k_padded].
template <int R>
void shrink_few(const ProjectPlan& plan, const Task& task, int rank, int stop, const float* x, Ahead& ahead) {
  const Use& use = *task.use;
  const int ranks = stop - rank;
  const std::uint8_t* rows[16];
  for (int j = 0; j < 16; ++j) rows[j] = plan.arena + use.a[rank + (j < ranks ? j : 0)];
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = _mm512_setzero_ps();
  for (int k = 0; k < plan.k_padded; k += 32) {
    const int left = plan.in_features - k;
    const __mmask32 mask = left < 32 ? (1u << left) - 1 : ~0u;
    __m512i a[16];
    for (int j = 0; j < 16; ++j) a[j] = _mm512_maskz_loadu_epi16(mask, rows[j] + 2 * k);
    turn(a);
    for (int r = 0; r < R; ++r) {
      const float* xs = x + r * plan.k_padded + k;
      __m512 evens = _mm512_setzero_ps(), odds = _mm512_setzero_ps();
      for (int p = 0; p < 16; ++p) {
        if (r == 0 && p % 4 == 0) ahead.fetch((ranks + p / 4) / 4);
        evens = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a[p], 16)), _mm512_set1_ps(xs[2 * p]), evens);
        odds = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a[p], odd)), _mm512_set1_ps(xs[2 * p + 1]), odds);
      }
      sum[r] = _mm512_add_ps(sum[r], _mm512_add_ps(evens, odds));
    }
  }
  const int ldz = use.stop - use.start;
  const __m512 scale = vload(use.scale + rank, ranks);
  for (int r = 0; r < R; ++r) {
    float z[16];
    vstore(z, sum[r] * scale);
    float* to = plan.z + use.z + static_cast<std::size_t>(rank) * ldz + (task.row + r - use.start);
    for (int j = 0; j < ranks; ++j) to[j * ldz] = z[j];
  }
}

// All ranks of a task with few rows.
void shrink_few(const ProjectPlan& plan, const Task& task, Ahead& ahead, float* x) {
  const TileRows inputs{plan.input, plan.tile_bytes};
  for (int r = 0; r < task.rows; ++r)
    for (int k = 0; k < plan.k_padded; k += kLanes)
      vstore(x + r * plan.k_padded + k, vload(TileRows::at(inputs.row(task.row + r), k)));
  for (int rank = 0; rank < task.use->rank; rank += 16) {
    const int stop = rank + 16 < task.use->rank ? rank + 16 : task.use->rank;
    switch (task.rows) {
      case 1: shrink_few<1>(plan, task, rank, stop, x, ahead); break;
      case 2: shrink_few<2>(plan, task, rank, stop, x, ahead); break;
      case 3: shrink_few<3>(plan, task, rank, stop, x, ahead); break;
      default: shrink_few<4>(plan, task, rank, stop, x, ahead);
    }
  }
}

// Ranks [rank, stop), at most 16, times up to 64 rows (4 row tiles). Full sets of ranks at a constant
// distance are multiplied where they lie, others are copied first.
void shrink_tiles(const ProjectPlan& plan, const Task& task, int rank, int stop, Ahead& ahead, std::byte* work) {
  const Use& use = *task.use;
  const int ranks = stop - rank;
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
    memory_is_read(rows);
  }
  const int first = task.row / kRowTile, tiles = (task.row + task.rows - 1) / kRowTile - first + 1;
  const std::size_t tile_bytes = std::size_t{32} * plan.k_padded;
  const std::byte* x = plan.turned + first * tile_bytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < plan.k_padded; k += 32, x += 1024) {
    _tile_loadd(4, rows + 2 * k, stride);
    _tile_loadd(5, x, 64);
    _tile_dpbf16ps(0, 4, 5);
    ahead.fetch(ranks);
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
      float* z = plan.z + use.z + static_cast<std::size_t>(rank + j) * ldz + (start - use.start);
      _mm512_mask_storeu_ps(z, mask, _mm512_load_ps(sums[t][j]) * vset(use.scale[rank + j]));
    }
  }
}

#endif

// The low rank part of one use, for some of its rows: z, and z B if it is wanted now.
void low_rank(const ProjectPlan& plan, const Task& task, Ahead& ahead, [[maybe_unused]] std::byte* work) {
  constexpr int kRanks = 16;  // at once: they stay in the L1 cache for all rows
  const Use& use = *task.use;
  ahead.begin(&task);
  int rank = 0;
#if CHILIAD_AMX
  if (plan.turned && use.dtype == DType::bfloat16) {
    if (task.rows <= kFewer)
      shrink_few(plan, task, ahead, reinterpret_cast<float*>(work));
    else
      for (; rank < use.rank; rank += kRanks)
        shrink_tiles(plan, task, rank, rank + kRanks < use.rank ? rank + kRanks : use.rank, ahead, work);
    rank = use.rank;
  }
#endif
  for (; rank < use.rank; rank += kRanks)
    shrink_any(plan, task, rank, rank + kRanks < use.rank ? rank + kRanks : use.rank, ahead);
  if (!plan.delta) return;
  float* to = plan.delta + static_cast<std::size_t>(task.row) * plan.out_features + use.first;
  const int count = use.size / kBlock, rest = use.size % kBlock;
  with_rows(use.dtype, [&]<class T>() {
    expand_blocks<T, false>(use, plan.arena, plan.z, 0, count, rest, task.row, task.rows, to, plan.out_features, kBlock, &ahead);
  });
}

}  // namespace
}  // namespace chiliad
