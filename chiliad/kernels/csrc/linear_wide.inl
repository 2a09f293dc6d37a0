// Products of many rows on AMX: rows of a panel in blocks of 32, the epilogue of one block between the tile
// instructions of the next, so that neither waits for the other.
#pragma once

#include "linear_epilogue.inl"
#include "linear_gemm.inl"

namespace chiliad {
namespace {

#if CHILIAD_AMX

// Steps of 32 k at most whose weights stay in the L1 cache (36 KB) while all rows pass, which are read past it.
constexpr int kHeld = 18;

// to[32][32] (rows `stride` floats apart) = from (tile after tile; null: zeros) + the rows of a[0], a[1] times
// `steps` pairs of weight tiles. Apart: the second 16 columns see other inputs, a[2] and a[3]. `lines` cache lines from
// `next` on are fetched with each step, and between(step) is called.
template <bool Two, bool Apart, class Between>
CHILIAD_INLINE void multiply_block(const std::byte* const (&a)[4], const std::byte* b, int steps, const float* from, float* to,
                                   int stride, const std::byte* next, int lines, const Between& between) {
  if (from == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    if (Two) _tile_zero(2);
    if (Two) _tile_zero(3);
  } else {
    _tile_loadd(0, from, 64);
    _tile_loadd(1, from + 256, 64);
    if (Two) _tile_loadd(2, from + 512, 64);
    if (Two) _tile_loadd(3, from + 768, 64);
  }
  for (int k = 0; k < steps; ++k, b += 2048) {
    // All loads before the products, and inputs first: any other order is slower.
    _tile_stream_loadd(4, a[0] + k * 1024, 64);
    if (Two) _tile_stream_loadd(5, a[1] + k * 1024, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 1024, 64);
    for (int i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    _tile_dpbf16ps(0, 4, 6);
    if (!Apart) _tile_dpbf16ps(1, 4, 7);
    if (Two) _tile_dpbf16ps(2, 5, 6);
    if (Apart) _tile_stream_loadd(4, a[2] + k * 1024, 64);
    if (Apart && Two) _tile_stream_loadd(5, a[3] + k * 1024, 64);
    if (Apart) _tile_dpbf16ps(1, 4, 7);
    if (Two) _tile_dpbf16ps(3, 5, 7);
    between(k);
  }
  const int half = stride == 16 ? 256 : 16, second = stride == 16 ? 512 : 16 * stride;
  _tile_stored(0, to, stride * 4);
  _tile_stored(1, to + half, stride * 4);
  if (Two) _tile_stored(2, to + second, stride * 4);
  if (Two) _tile_stored(3, to + second + half, stride * 4);
}

// One worker's products of one linear, panel after panel.
template <Activation A, bool Add>
class Wide {
 public:
  Wide(const ProjectPlan& plan, std::byte* work)
      : plan_(plan), sums_(reinterpret_cast<float*>(work)), partial_(sums_ + 2 * kBlockSums),
        room_(work + (2 * kBlockSums + std::size_t{kWideRows} * kPanel) * sizeof(float)),
        row_tiles_((plan.rows + kRowTile - 1) / kRowTile) {}
  ~Wide() { finish_rows(0, 32); }

  // Rows [first, last), at most kWideRows.
  void operator()(int panel, int first, int last) {
    const int steps = plan_.k_padded / 32, stretches = (steps + kHeld - 1) / kHeld, stretch = (steps + stretches - 1) / stretches;
    const int blocks = (last - first + 31) / 32;
    const std::byte* weights = plan_.weights + panel * plan_.panel_bytes;
    const std::byte* next = plan_.weights + (panel + 1 < plan_.num_panels ? panel + 1 : 0) * plan_.panel_bytes;
    const int lines = static_cast<int>((plan_.panel_bytes / 64 + blocks * steps - 1) / (blocks * steps));
    for (int k = 0; k < steps; k += stretch) {
      const int count = steps - k < stretch ? steps - k : stretch;
      const std::byte* b = weights + k * 2048;
      if (quantized(plan_.dtype)) {
        for (int i = 0; i < count; ++i) unpack_pair(plan_.dtype, weights, k + i, room_ + i * 2048);
        memory_is_read(room_);
        b = room_;
      }
      for (int row = first; row < last; row += 32, next += lines * count * 64)
        block(panel, row, last - row < 32 ? last - row : 32, k, count, k + count == steps, b,
              partial_ + (row - first) * kPanel, next, lines);
    }
  }

 private:
  static constexpr bool kPair = A == Activation::silu_mul || A == Activation::gelu_tanh_mul;
  static constexpr int kBlockSums = 32 * kPanel;

  // Steps [k, k + steps) of up to 32 rows.
  void block(int panel, int row, int rows, int k, int steps, bool last, const std::byte* b, float* partial,
             const std::byte* next, int lines) {
    const Block* blocks = plan_.blocks + 2 * panel;
    const int p0 = blocks[0].projection, p1 = blocks[1].width ? blocks[1].projection : p0;
    const bool two = rows > kRowTile;
    const std::byte* const* t0 = plan_.tiles + p0 * row_tiles_ + row / kRowTile;
    const std::byte* const* t1 = plan_.tiles + p1 * row_tiles_ + row / kRowTile;
    const std::byte* const a[4] = {t0[0] + k * 1024, t0[two] + k * 1024, t1[0] + k * 1024, t1[two] + k * 1024};
    const bool apart = a[0] != a[2] || a[1] != a[3];
    float* to = last ? sums_ + turn_ * kBlockSums : partial;
    const int stride = last ? kPanel : kBlock;
    const int each = (31 + steps) / steps, pending = last ? each : 0;
    auto call = [&]<bool Two, bool Apart>() {
      multiply_block<Two, Apart>(a, b, steps, k ? partial : nullptr, to, stride, next, lines,
                                 [&](int i) { finish_rows(i * pending, (i + 1) * pending); });
    };
    if (two) apart ? call.template operator()<true, true>() : call.template operator()<true, false>();
    else apart ? call.template operator()<false, true>() : call.template operator()<false, false>();
    if (!last) return;
    apply_all(plan_, panel, 1, row, rows, to, kPanel);
    finish_later(blocks, row, rows, to);
    turn_ ^= 1;
  }

  // Remember full blocks for `finish_rows`; do others at once.
  void finish_later(const Block* blocks, int row, int rows, const float* c) {
    waiting_ = 0;
    if (blocks[0].width < kBlock || blocks[1].width < kBlock || (!kPair && blocks[1].out != blocks[0].out + kBlock) ||
        (A != Activation::none && plan_.add)) {
      for (int r = 0; r < rows; ++r) finish_row<A, Add>(plan_, blocks, 2, row + r, c + r * kPanel);
      return;
    }
    waiting_ = rows;
    c_ = c;
    const int out = blocks[0].out;
    tiled_ = static_cast<bool>(plan_.y_tiles);
    y_step_ = tiled_ ? plan_.y_tiles.bytes : plan_.y_stride * sizeof(float);
    y_ = tiled_ ? plan_.y_tiles.data + row / kRowTile * y_step_ + out / 32 * 1024 + out % 32 * 2
                : reinterpret_cast<std::byte*>(plan_.y + out) + row * y_step_;
  }

  // Rows [from, to) of the block that waits.
  CHILIAD_INLINE void finish_rows(unsigned from, unsigned to) {
    if (to > waiting_) to = waiting_;
#pragma GCC unroll 2
    for (unsigned r = from; r < to; ++r) {
      const float* c = c_ + r * kPanel;
      Vec y[2] = {vload(c), vload(c + kBlock)};
      if constexpr (A == Activation::silu_mul) y[0] = vsilu(y[0]) * y[1];
      if constexpr (A == Activation::gelu_tanh_mul) y[0] = vgelu_tanh(y[0]) * y[1];
      if constexpr (A == Activation::gelu_tanh) y[0] = vgelu_tanh(y[0]), y[1] = vgelu_tanh(y[1]);
      if constexpr (A == Activation::gelu) y[0] = vgelu(y[0]), y[1] = vgelu(y[1]);
      if (tiled_) {
        bf16* to = reinterpret_cast<bf16*>(y_ + r / kRowTile * y_step_ + r % kRowTile * 64);
        vstore_bf16(to, y[0]);
        if (!kPair) vstore_bf16(to + kBlock, y[1]);
      } else {
        float* to = reinterpret_cast<float*>(y_ + r * y_step_);
        vstore(to, Add ? y[0] + vload(to) : y[0]);
        if (!kPair) vstore(to + kBlock, Add ? y[1] + vload(to + kBlock) : y[1]);
      }
    }
  }

  const ProjectPlan& plan_;
  float *sums_, *partial_;  // of two blocks, row after row; of all blocks of a chunk, tile after tile
  std::byte* room_;         // unpacked weights
  int row_tiles_;
  int turn_ = 0;            // which of the two sums comes next
  // the block whose sums wait: rows, sums, where its first row goes, bytes to the next row (to the next row tile)
  unsigned waiting_ = 0;
  const float* c_ = nullptr;
  std::byte* y_ = nullptr;
  std::size_t y_step_ = 0;
  bool tiled_ = false;
};

#endif

}  // namespace
}  // namespace chiliad
