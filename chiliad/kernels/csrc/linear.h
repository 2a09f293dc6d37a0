// A linear projection with adapters: y = residual + act(Linear(norm(x)) with adapters).
//
// Packed weights. Columns are cut into blocks of 16 that never straddle projections, two
// blocks make a panel, and a panel is one contiguous stretch of memory that one thread walks
// from front to back:
//   float32   [K][32]
//   bfloat16  [K / 32][2 blocks][16 pairs of k][16 columns][2]    (tiles of 1 KB)
//   int8      [K / 32] groups: levels -127..127 [2 blocks][8][4][2 pairs of k][4 columns][2], then
//             one float16 scale per column, [2 blocks][16]
//   int4      [K / 32] groups: levels 0..15 [2 blocks][4][16 columns][2] in words of 4 pairs of k, the
//             first in the lowest bits; then float16 scales [2 blocks][16] and minima [2 blocks][16]
// A quantised weight is scale * level + minimum; see linear_quantized.inl. K is padded with zeros
// to a multiple of 32 (all but float32). Two projections of equal size (gate, up) alternate block
// by block, so that a panel holds both and act(gate) * up needs no second pass.
//
// Inputs are cut into tiles of 16 rows: float32 [16][K], or, where the machine multiplies
// bfloat16, [K / 32][16 rows][32] (tiles of 1 KB). Where int4 levels are multiplied as they are, the
// sums of each row over groups of 32 k follow the tile, float32 [K / 32][16 rows].
//
// Every output element is a chain of additions in the order of k, whatever rows come along:
// that is what makes results independent of the batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace chiliad {

constexpr int kBlock = 16, kPanel = 32, kRowTile = 16;
constexpr int kGroup = 4;               // panels that one thread takes at a time, at most
constexpr int kStride = kGroup * kPanel;  // of a row of sums, in floats
constexpr int kPartRows = 4;             // rows of a step that are multiplied in parts, at most
constexpr int kWideRows = 512;          // rows of an item at most

// Bytes of 32 k in a panel.
inline constexpr std::size_t group_bytes(DType dtype) {
  return dtype == DType::int4 ? 512 + 128 : dtype == DType::int8 ? 1024 + 64 : std::size_t{32} * kPanel * item_bytes(dtype);
}

struct Block {
  int projection;  // -1: padding
  int column;      // first column within the projection
  int width;       // valid columns, 0..16
  int out;         // first column within y
};

// What one segment's adapter does to one projection.
struct Use {
  int start, stop;  // rows
  int first, size;  // columns of the projection, in the whole linear
  int rank;
  DType dtype;  // of the rank rows
  const std::int64_t *a, *b;  // offsets of the rank rows
  const float* scale;
  std::size_t numbers;  // where a, b and scale start in Uses::numbers
  std::size_t z;  // where its [rank][rows] products of phase 1 are, in floats
  const std::uint8_t *d, *g, *c;
};

// Cache lines of one rank row.
inline constexpr int row_lines(int length, DType dtype) { return (length * item_bytes(dtype) + 63) / 64; }

// The low rank part of rows [row, row + rows) of one use.
struct Task {
  const Use* use;
  int row, rows;
  int stretch;  // first of its rank rows in Uses::stretches
};

// What the adapters of a batch do to one linear. Decode steps repeat their batch, so a linear keeps
// it until another one comes.
struct Uses {
  std::uint64_t batch = 0;   // Kernels::batch_of that it was made for
  std::uint64_t made = 0;    // a serial of its own each time
  std::vector<Use> uses;     // sorted by projection, then by row
  std::vector<int> from;     // [projections + 1]: first use of each
  std::vector<Task> tasks;
  std::vector<Stretch> stretches;  // rank rows in the order of tasks, A before B
  std::vector<std::int64_t> numbers;  // what uses point to, in their order: offsets of A, of B, scales
  std::size_t shrunk = 0;    // floats of all z
  std::int64_t lines = 0;    // of all stretches
  bool any_d = false, any_bf16 = false, any_f32 = false;  // vectors d; rank rows
};

// Belongs to one Kernels at a time: `project` changes what it remembers.
struct PackedLinear : std::enable_shared_from_this<PackedLinear> {
  DType dtype;
  int in_features, out_features, k_padded;
  std::vector<int> sizes, slots;
  bool paired;  // (gate, up) alternate
  int num_panels;
  std::vector<Block> blocks;  // [2 * num_panels]
  std::size_t panel_bytes;
  std::shared_ptr<std::byte> weights;  // [num_panels][panel_bytes]
  std::vector<float> bias;   // [num_panels * 32], or empty
  Uses uses;                         // of the last batch
  std::weak_ptr<PackedLinear> next;  // what was projected after it the last time: models repeat themselves
  std::size_t nbytes() const { return panel_bytes * num_panels; }
};

// Weights as they come, [out, in]: float32 or bfloat16; or levels, one to a byte (int8: -127..127, int4:
// 0..15), with a float16 scale (int4: and minimum) for every 32 inputs, [out, ceil(in / 32)].
struct Weights {
  const void* data;
  DType dtype;
  const std::uint16_t *scale = nullptr, *minimum = nullptr;
};

// Levels are packed as what they are, plain weights as float32 or bfloat16. bias: float32 [out] or null.
std::shared_ptr<PackedLinear> pack_linear(Kernels& kernels, const Weights& weights, const float* bias, DType dtype, int in_features,
                                          std::vector<int> sizes, std::vector<int> slots);

enum class NormKind : int { none, rms, layer };
enum class Activation : int { none, silu_mul, gelu_tanh_mul, gelu_tanh, gelu };

struct Norm {
  NormKind kind = NormKind::none;
  const float* weight = nullptr;
  const float* bias = nullptr;
  float eps = 0;
};

// Rows as a linear multiplies them (see Inputs above): whoever makes them may write them like that.
struct Tiles {
  std::byte* data = nullptr;
  std::size_t bytes = 0;  // of one tile

  explicit operator bool() const { return data != nullptr; }
};

// Room for a linear's input tiles, valid until the next call; none if this step needs the inputs as floats, too.
Tiles room_for_inputs(Kernels& kernels, PackedLinear& linear, const Step* step, int rows);

// y may be x only if that is where the residual comes from (add). Inputs may come as tiles instead of x, and outputs
// may go to the next linear's instead of y.
void project(Kernels& kernels, PackedLinear& linear, const Step* step, const float* x, int rows,
             const Norm& norm, Activation activation, float* y, bool add, const Tiles& from = {}, const Tiles& to = {});

// y = norm(x), or y += norm(x).
void norm(Kernels& kernels, const float* x, int rows, int features, const Norm& norm, float* y, bool add);

// What the adapters of a step (null: none) do to a linear; valid until the next call for it.
// Throws KernelError where an adapter's rows do not lie in the arena.
const Uses& uses_of(Kernels& kernels, PackedLinear& linear, const Step* step);

// ---- between linear.cpp (checks, plans) and linear.inl (computes): raw pointers only ----

struct ProjectPlan {
  ThreadPool* threads;
  DType dtype;
  int in_features, out_features, k_padded, num_projections, num_panels;
  bool paired;
  const Block* blocks;
  const std::byte* weights;
  std::size_t panel_bytes;
  const float* bias;  // or null

  const float* x;
  int rows;
  Norm norm;
  Activation activation;
  float* y;
  int y_stride;
  bool add;
  Tiles y_tiles;  // instead of y
  bool y_streams;  // more than the caches hold: y is written past them

  // inputs: filled in phase 0
  float* x32;               // [rows][in_features] normalised, or null: nobody wants them, or x serves
  std::byte* input;         // row tiles in the dtype's form, or null: x serves (float32)
  bool ready;               // they came as such
  std::size_t tile_bytes;   // of one row tile
  std::byte* parts;         // of a few rows for quantised weights, or null: per row int8 [K / 32][2][32], the high and low parts
                            // of 32 inputs; then float scales and whole sums of the groups [K / 32]
  std::size_t part_bytes;   // of one row
  std::size_t sums_at;      // where in a tile the sums over groups are; 0: not wanted
  const std::byte** tiles;  // [projections][row tiles]: the base input, or one with d applied
  std::byte* scaled;        // room for input tiles with d applied, or null
  int* scaled_at;           // [projections][row tiles]: index into scaled, or -1
  std::byte* turned;        // bfloat16 tiles of x with rows and pairs exchanged, for shrink; or null

  // adapters
  const std::uint8_t* arena;
  const Use* uses;       // sorted by projection, then by row
  const int* uses_from;  // [projections + 1]
  const Task* tasks;
  int num_tasks;
  const Stretch *stretches, *stretches_end;
  float* delta;  // [rows][out_features]: z B of rows with low rank, or null: the epilogue computes it

  float* z;      // of all uses

  const std::byte* next_weights;  // of what will probably be projected after this one, or null
  std::size_t next_panel_bytes;
  int next_panels;
  Early* early;  // to fetch meanwhile: by worker, or null

  std::byte* work;  // per worker: work_bytes
  std::size_t work_bytes;
};

struct LinearOps {
  void (*project)(const ProjectPlan&);
  void (*norm)(ThreadPool& threads, const float* x, int rows, int features, const Norm& norm, float* y, bool add);
  bool bf16_tiles;  // inputs are stored as bfloat16 tiles (else rounded, as float32)
  bool levels;      // int4 wants the sums of inputs over groups
  bool parts;       // few rows are multiplied with quantised weights in parts
  bool turned;      // shrink multiplies bfloat16 rank rows with `turned` tiles
};

// A worker's room: sums (twice), an unpacked panel, rank rows that need copying; or for products of many rows with
// tiles (see linear_wide.inl) the sums of two blocks and of a chunk, and an unpacked stretch.
inline std::size_t work_bytes(int k_padded) {
  const std::size_t few = 2 * 32 * kStride * sizeof(float) + std::size_t{64} * k_padded + std::size_t{32} * (k_padded + 32) + 4096;
  const std::size_t wide = (2 * 32 + kWideRows) * kPanel * sizeof(float) + 64 * 1024;
  return few > wide ? few : wide;
}

}  // namespace chiliad
