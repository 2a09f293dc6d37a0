// The end of a projection: what follows the products of phase 2.
#pragma once

#include <type_traits>

#include "linear_inputs.inl"
#include "linear_low_rank.inl"

namespace chiliad {
namespace {

// What one use does to `count` neighbouring blocks (full ones, or a single one of `width`
// columns) of rows [first, first + rows); c points at them.
template <class T>
void apply(const ProjectPlan& plan, const Use& use, const Block& block, int count, int step, int first, int rows, float* c, int stride) {
  using V = std::conditional_t<sizeof(T) == 4, float, bf16>;  // of vectors, see vectors_beside
  if (use.g || use.c)
    for (int b = 0; b < count; ++b)
      for (int v = 0; v * kLanes < block.width; ++v) {
        const int left = block.width - v * kLanes < kLanes ? block.width - v * kLanes : kLanes;
        const int at = block.column + b * kBlock + v * kLanes;
        for (int r = 0; r < rows; ++r) {
          float* p = c + r * stride + b * step + v * kLanes;
          Vec y = vload(p);
          if (use.g) y = y * vload(reinterpret_cast<const V*>(use.g) + at, left);
          if (use.c) y = y + vload(reinterpret_cast<const V*>(use.c) + at, left);
          vstore(p, y);
        }
      }
  if (use.rank == 0) return;
  if (!plan.delta) {
    const bool full = block.width == kBlock;
    expand_blocks<T, true>(use, plan.arena, plan.z, block.column, full ? count : 0, full ? 0 : block.width, first, rows, c, stride, step, nullptr);
    return;
  }
  for (int r = 0; r < rows; ++r) {
    const float* delta = plan.delta + static_cast<std::size_t>(first + r) * plan.out_features + block.out;
    for (int b = 0; b < count; ++b)
      for (int v = 0; v < kVecs; ++v) {  // what lies beyond `width` is never stored
        float* p = c + r * stride + b * step + v * kLanes;
        vstore(p, vload(p) + vload(delta + b * kBlock + v * kLanes));
      }
  }
}

void apply_uses(const ProjectPlan& plan, const Block& block, int count, int step, int row, int rows, float* c, int stride) {
  const Use* end = plan.uses + plan.uses_from[block.projection + 1];
  for (const Use* use = find_use(plan, block.projection, row); use < end && use->start < row + rows; ++use) {
    const int first = use->start > row ? use->start : row;
    const int last = use->stop < row + rows ? use->stop : row + rows;
    float* cu = c + (first - row) * stride;
    with_rows(use->dtype, [&]<class T>() { apply<T>(plan, *use, block, count, step, first, last - first, cu, stride); });
  }
}

// The last step of the epilogue for one row of sums: activation, residual, and c goes to y, or, as the next
// linear wants it, to its input tiles.
template <Activation A, bool Add>  // Add: known beforehand, for products without activation
CHILIAD_INLINE void finish_row(const ProjectPlan& plan, const Block* blocks, int count, int row, const float* c) {
  constexpr bool kPair = A == Activation::silu_mul || A == Activation::gelu_tanh_mul;
  const bool add = A == Activation::none ? Add : plan.add;
  for (int i = 0; i < count; i += kPair ? 2 : 1) {
    const int width = blocks[i].width;
    float* y = plan.y + static_cast<std::size_t>(row) * plan.y_stride + blocks[i].out;
    for (int v = 0; v < kVecs; ++v) {
      const float* p = c + i * kBlock + v * kLanes;
      Vec value = vload(p);
      if constexpr (A == Activation::silu_mul) value = vsilu(value);
      if constexpr (A == Activation::gelu_tanh_mul || A == Activation::gelu_tanh) value = vgelu_tanh(value);
      if constexpr (A == Activation::gelu) value = vgelu(value);
      if constexpr (kPair) value = value * vload(p + kBlock);
      if (plan.y_tiles) {
        const int at = blocks[i].out + v * kLanes;
        std::byte* tile = plan.y_tiles.data + row / kRowTile * plan.y_tiles.bytes;
        vstore_bf16(reinterpret_cast<bf16*>(tile + at / 32 * 1024 + row % kRowTile * 64) + at % 32, value);
      } else if (width == kBlock && plan.y_streams) {
        vstream(y + v * kLanes, value);
      } else if (width == kBlock) {
        vstore(y + v * kLanes, add ? value + vload(y + v * kLanes) : value);
      } else if (const int left = width - v * kLanes; left > 0) {
        const int n = left < kLanes ? left : kLanes;
        vstore(y + v * kLanes, add ? value + vload(y + v * kLanes, n) : value, n);
      }
    }
  }
}

// f.operator()<activation, whether y is added to>().
template <class F>
CHILIAD_INLINE void with_finish(const ProjectPlan& plan, const F& f) {
  switch (plan.activation) {
    case Activation::none: return plan.add ? f.template operator()<Activation::none, true>() : f.template operator()<Activation::none, false>();
    case Activation::silu_mul: return f.template operator()<Activation::silu_mul, false>();
    case Activation::gelu_tanh_mul: return f.template operator()<Activation::gelu_tanh_mul, false>();
    case Activation::gelu_tanh: return f.template operator()<Activation::gelu_tanh, false>();
    case Activation::gelu: return f.template operator()<Activation::gelu, false>();
  }
}

// What comes between the GEMM and `finish_row`, on c[rows][32 panels]: bias and adapters.
void apply_all(const ProjectPlan& plan, int panel, int panels, int row, int rows, float* c, int stride) {
  const Block* blocks = plan.blocks + 2 * panel;
  const int count = 2 * panels;
  if (plan.bias)
    for (int i = 0; i < count * kBlock; i += kLanes) {
      const Vec bias = vload(plan.bias + panel * kPanel + i);
      for (int r = 0; r < rows; ++r) {
        float* p = c + r * stride + i;
        vstore(p, vload(p) + bias);
      }
    }
  if (plan.uses_from[plan.num_projections] == 0) return;
  // runs of full blocks of one projection: neighbours, or every other one where they alternate
  const int every = plan.paired ? 2 : 1;
  for (int s = 0; s < every; ++s)
    for (int i = s; i < count;) {
      int j = i + every;
      while (blocks[i].width == kBlock && j < count && blocks[j].width == kBlock && blocks[j].projection == blocks[i].projection)
        j += every;
      if (blocks[i].width) apply_uses(plan, blocks[i], (j - i) / every, every * kBlock, row, rows, c + i * kBlock, stride);
      i = j;
    }
}

// Everything after the GEMM, on c[rows][32 panels]; then the result goes to y.
void epilogue(const ProjectPlan& plan, int panel, int panels, int row, int rows, float* c) {
  apply_all(plan, panel, panels, row, rows, c, kStride);
  with_finish(plan, [&]<Activation A, bool Add>() {
    for (int r = 0; r < rows; ++r) finish_row<A, Add>(plan, plan.blocks + 2 * panel, 2 * panels, row + r, c + r * kStride);
  });
}

}  // namespace
}  // namespace chiliad
