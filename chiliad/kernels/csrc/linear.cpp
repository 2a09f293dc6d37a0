// Checks, packing and the plan of one `project` call; linear.inl does the arithmetic.
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>

namespace chiliad {

CHILIAD_TABLES(LinearOps, linear_ops)

namespace {

std::uint16_t round_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Plain weights as float32.
struct Source {
  const void* data;
  DType dtype;
  int in_features;
  float operator()(int row, int k) const {
    const std::size_t i = static_cast<std::size_t>(row) * in_features + k;
    if (dtype == DType::float32) return static_cast<const float*>(data)[i];
    const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(data)[i]} << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
  }
};

// Column n of block `half` of a panel, from the levels of one row.
void pack_levels(const Weights& weights, DType dtype, int in_features, int row, int half, int n, std::byte* panel) {
  const auto* level = static_cast<const std::uint8_t*>(weights.data) + static_cast<std::size_t>(row) * in_features;
  const int groups = (in_features + 31) / 32, tile = dtype == DType::int4 ? 256 : 512;
  for (int g = 0; g < groups; ++g, panel += group_bytes(dtype), level += 32) {
    const int count = std::min(32, in_features - 32 * g);
    std::byte* to = panel + half * tile;
    if (dtype == DType::int8) {
      for (int k = 0; k < count; ++k)
        to[k / 4 * 64 + n / 4 * 16 + k / 2 % 2 * 8 + n % 4 * 2 + k % 2] = static_cast<std::byte>(level[k]);
    } else {
      for (int k = 0; k < count; ++k)
        to[k / 8 * 64 + n * 4 + k % 2 * 2 + k / 4 % 2] |= static_cast<std::byte>((level[k] & 15) << (k / 2 % 2 * 4));
    }
    const std::size_t at = static_cast<std::size_t>(row) * groups + g;
    std::memcpy(panel + 2 * tile + half * 32 + n * 2, weights.scale + at, 2);
    if (dtype == DType::int4) std::memcpy(panel + 2 * tile + 64 + half * 32 + n * 2, weights.minimum + at, 2);
  }
}

void pack_block(PackedLinear& linear, const Weights& weights, int index, std::byte* panel) {
  const Source weight{weights.data, weights.dtype, linear.in_features};
  const Block& block = linear.blocks[index];
  const int half = index % 2;
  for (int n = 0; n < block.width; ++n) {
    const int row = block.out + n;
    if (linear.dtype == DType::float32) {
      float* to = reinterpret_cast<float*>(panel) + half * kBlock + n;
      for (int k = 0; k < linear.in_features; ++k) to[static_cast<std::size_t>(k) * kPanel] = weight(row, k);
    } else if (linear.dtype == DType::bfloat16) {
      auto* to = reinterpret_cast<std::uint16_t*>(panel) + half * 512 + n * 2;
      for (int k = 0; k < linear.in_features; ++k)
        to[k / 32 * 1024 + k % 32 / 2 * 32 + k % 2] = round_bf16(weight(row, k));
    } else {
      pack_levels(weights, linear.dtype, linear.in_features, row, half, n, panel);
    }
  }
}

void lay_out(PackedLinear& linear) {
  std::vector<int> first(linear.sizes.size(), 0);
  std::partial_sum(linear.sizes.begin(), linear.sizes.end() - 1, first.begin() + 1);
  const int count = static_cast<int>(linear.sizes.size());
  linear.paired = count == 2 && linear.sizes[0] == linear.sizes[1];
  auto add = [&](int p, int column) {
    linear.blocks.push_back({p, column, std::min(kBlock, linear.sizes[p] - column), first[p] + column});
  };
  if (linear.paired)
    for (int column = 0; column < linear.sizes[0]; column += kBlock) add(0, column), add(1, column);
  else
    for (int p = 0; p < count; ++p)
      for (int column = 0; column < linear.sizes[p]; column += kBlock) add(p, column);
  if (linear.blocks.size() % 2) linear.blocks.push_back({-1, 0, 0, 0});
  linear.num_panels = static_cast<int>(linear.blocks.size()) / 2;
}

// What one call plans; kept to save allocations. One per thread: an op runs on one thread.
struct Plans {
  std::vector<Use> uses;
  std::vector<int> uses_from, scaled_at;
  std::vector<Task> tasks;
  std::vector<const std::byte*> tiles;
};

enum Scratch { kInputs, kNormed, kScaled, kShrunk, kTurned, kDelta, kWork };

const std::uint8_t* vector_at(const Arena& arena, std::int64_t offset, int length, DType dtype) {
  if (offset < 0) return nullptr;
  if (offset + std::int64_t{length} * item_bytes(dtype) > arena.bytes)
    throw KernelError("an adapter's vector ends beyond the arena");
  return arena.data + offset;
}

// What the next linear of this adapter will ask for: `LowRank`s and numbers lie in the order of slots.
void fetch_next(const LowRank& low) {
  const auto* slots = reinterpret_cast<const char*>(&low + 1);
  const auto* numbers = reinterpret_cast<const char*>(low.scale + low.rank);
  for (int line = 0; line < 192; line += 64) __builtin_prefetch(slots + line, 0, 2);
  for (int line = 0; line < 512; line += 64) __builtin_prefetch(numbers + line, 0, 2);
}

// Fills uses (sorted by projection, then row) and says whether any has d.
bool collect_uses(const Arena& arena, const PackedLinear& linear, const Step* step, Plans& plans) {
  bool any_d = false;
  plans.uses.clear();
  plans.uses_from.assign(1, 0);
  int first = 0;
  for (std::size_t p = 0; p < linear.sizes.size(); first += linear.sizes[p++]) {
    if (step != nullptr && linear.slots[p] >= 0)
      for (const Segment& segment : step->segments) {
        if (segment.adapter == nullptr) continue;
        const Adapter& adapter = *segment.adapter;
        const LowRank* low = adapter.low_rank(linear.slots[p]);
        const Elementwise* vectors = adapter.elementwise(linear.slots[p]);
        if (low == nullptr && vectors == nullptr) continue;
        const DType beside = vectors_beside(adapter.dtype);
        Use use{};
        use.start = segment.start;
        use.stop = segment.stop;
        use.first = first;
        use.size = linear.sizes[p];
        use.dtype = adapter.dtype;
        if (low != nullptr) {
          vector_at(arena, low->last_a, linear.in_features, adapter.dtype);
          vector_at(arena, low->last_b, linear.sizes[p], adapter.dtype);
          use.rank = low->rank;
          use.a = low->a;
          use.b = low->b;
          use.scale = low->scale;
          if (p + 1 == linear.sizes.size()) fetch_next(*low);
        }
        if (vectors != nullptr) {
          use.d = vector_at(arena, vectors->d, linear.in_features, beside);
          use.g = vector_at(arena, vectors->g, linear.sizes[p], beside);
          use.c = vector_at(arena, vectors->c, linear.sizes[p], beside);
          any_d = any_d || use.d;
        }
        plans.uses.push_back(use);
      }
    plans.uses_from.push_back(static_cast<int>(plans.uses.size()));
  }
  return any_d;
}

void plan_tasks(Kernels& kernels, Plans& plans) {
  constexpr int kRows = 64;
  std::size_t total = 0;
  for (const Use& use : plans.uses) total += static_cast<std::size_t>(use.stop - use.start) * use.rank;
  auto* z = reinterpret_cast<float*>(kernels.scratch(kShrunk, total * sizeof(float)));
  plans.tasks.clear();
  for (Use& use : plans.uses) {
    use.z = z;
    z += static_cast<std::size_t>(use.stop - use.start) * use.rank;
    for (int row = use.start, next; use.rank > 0 && row < use.stop; row = next) {
      next = std::min((row / kRows + 1) * kRows, use.stop);
      plans.tasks.push_back({&use, row, next - row});
    }
  }
}

}  // namespace

PackedLinear pack_linear(Kernels& kernels, const Weights& weights, const float* bias, DType dtype, int in_features,
                         std::vector<int> sizes, std::vector<int> slots) {
  const bool levels = weights.dtype == DType::int8 || weights.dtype == DType::int4;
  if (levels ? dtype != weights.dtype : dtype != DType::float32 && dtype != DType::bfloat16)
    throw KernelError("levels are packed as what they are, plain weights as float32 or bfloat16");
  if (levels && (!weights.scale || (dtype == DType::int4 && !weights.minimum)))
    throw KernelError("levels need their scales, and int4 its minima");
  if (in_features <= 0 || sizes.empty() || sizes.size() != slots.size() ||
      std::any_of(sizes.begin(), sizes.end(), [](int size) { return size <= 0; }))
    throw KernelError("a linear needs positive sizes and one slot per size");
  PackedLinear linear;
  linear.dtype = dtype;
  linear.in_features = in_features;
  linear.out_features = std::accumulate(sizes.begin(), sizes.end(), 0);
  linear.k_padded = dtype == DType::float32 ? in_features : (in_features + 31) / 32 * 32;
  linear.sizes = std::move(sizes);
  linear.slots = std::move(slots);
  lay_out(linear);
  linear.panel_bytes = dtype == DType::float32 ? static_cast<std::size_t>(linear.k_padded) * kPanel * sizeof(float)
                                               : static_cast<std::size_t>(linear.k_padded) / 32 * group_bytes(dtype);
  if (bias != nullptr) {
    linear.bias.assign(linear.blocks.size() * kBlock, 0.0f);
    for (std::size_t i = 0; i < linear.blocks.size(); ++i)
      std::copy_n(bias + linear.blocks[i].out, linear.blocks[i].width, linear.bias.data() + i * kBlock);
  }
  std::lock_guard lock(kernels.busy);
  linear.weights = kernels.keep(linear.nbytes());
  kernels.threads.share(0, linear.num_panels);
  kernels.threads.run([&](int worker) {
    for (int panel; (panel = kernels.threads.next(0, worker)) >= 0;)
      for (int half = 0; half < 2; ++half)
        pack_block(linear, weights, 2 * panel + half, linear.weights.get() + panel * linear.panel_bytes);
  });
  return linear;
}

void project(Kernels& kernels, const PackedLinear& linear, const Step* step, const float* x, int rows,
             const Norm& norm, Activation activation, float* y, bool add) {
  if (rows <= 0) return;
  if (step != nullptr && step->num_tokens != rows) throw KernelError("x must have one row per token of the step");
  const bool pair = activation == Activation::silu_mul || activation == Activation::gelu_tanh_mul;
  if (pair && !linear.paired) throw KernelError("this activation needs a linear of two equal projections (gate, up)");
  std::lock_guard lock(kernels.busy);
  const LinearOps& ops = linear_ops(kernels.isa);
  thread_local Plans plans;
  const bool any_d = collect_uses(kernels.arena, linear, step, plans);
  plan_tasks(kernels, plans);

  const int projections = static_cast<int>(linear.sizes.size()), row_tiles = (rows + kRowTile - 1) / kRowTile;
  const std::size_t row_bytes = std::size_t{sizeof(float)} * linear.in_features;
  const bool f32 = linear.dtype == DType::float32;
  ProjectPlan plan{};
  plan.threads = &kernels.threads;
  plan.dtype = linear.dtype;
  plan.in_features = linear.in_features;
  plan.out_features = linear.out_features;
  plan.k_padded = linear.k_padded;
  plan.num_projections = projections;
  plan.num_panels = linear.num_panels;
  plan.blocks = linear.blocks.data();
  plan.weights = linear.weights.get();
  plan.panel_bytes = linear.panel_bytes;
  plan.paired = linear.paired;
  plan.bias = linear.bias.empty() ? nullptr : linear.bias.data();
  plan.x = x;
  plan.rows = rows;
  plan.norm = norm;
  plan.activation = activation;
  plan.y = y;
  plan.y_stride = pair ? linear.out_features / 2 : linear.out_features;
  plan.add = add;
  plan.arena = kernels.arena.data;
  plan.uses = plans.uses.data();
  plan.uses_from = plans.uses_from.data();
  plan.tasks = plans.tasks.data();
  plan.num_tasks = static_cast<int>(plans.tasks.size());
  constexpr int kFewRows = 64;  // up to here reading B takes longer than the arithmetic with it
  if (plan.num_tasks > 0 && rows <= kFewRows)
    plan.delta = reinterpret_cast<float*>(kernels.scratch(kDelta, sizeof(float) * (static_cast<std::size_t>(linear.out_features) * rows + 16)));

  plan.tile_bytes = f32 ? row_bytes * kRowTile
                        : std::size_t{kRowTile} * linear.k_padded * (ops.bf16_tiles ? 2 : sizeof(float));
  if (linear.dtype == DType::int4 && ops.levels) {
    plan.sums_at = plan.tile_bytes;
    plan.tile_bytes += sizeof(float) * kRowTile * linear.k_padded / 32;
  }
  if (norm.kind != NormKind::none)
    plan.x32 = reinterpret_cast<float*>(kernels.scratch(kNormed, row_bytes * rows));
  if (!f32 || (x == y && norm.kind == NormKind::none)) plan.input = kernels.scratch(kInputs, plan.tile_bytes * row_tiles);
  const std::byte* base = plan.input ? plan.input : reinterpret_cast<const std::byte*>(plan.x32 ? plan.x32 : x);
  plans.tiles.resize(static_cast<std::size_t>(projections) * row_tiles);
  for (int p = 0; p < projections; ++p)
    for (int t = 0; t < row_tiles; ++t) plans.tiles[p * row_tiles + t] = base + t * plan.tile_bytes;
  if (any_d) {
    plans.scaled_at.assign(plans.tiles.size(), -1);
    int count = 0;
    for (int p = 0; p < projections; ++p)
      for (int i = plans.uses_from[p]; i < plans.uses_from[p + 1]; ++i)
        if (plans.uses[i].d != nullptr)
          for (int t = plans.uses[i].start / kRowTile; t <= (plans.uses[i].stop - 1) / kRowTile; ++t)
            if (int& at = plans.scaled_at[p * row_tiles + t]; at < 0) at = count++;
    plan.scaled = kernels.scratch(kScaled, plan.tile_bytes * count);
    plan.scaled_at = plans.scaled_at.data();
    for (std::size_t i = 0; i < plans.tiles.size(); ++i)
      if (plans.scaled_at[i] >= 0) plans.tiles[i] = plan.scaled + plans.scaled_at[i] * plan.tile_bytes;
  }
  plan.tiles = plans.tiles.data();
  const bool bf16_rows = std::any_of(plans.tasks.begin(), plans.tasks.end(), [](const Task& task) {
    return task.use->dtype == DType::bfloat16;
  });
  if (ops.turned && !f32 && bf16_rows) plan.turned = kernels.scratch(kTurned, plan.tile_bytes * row_tiles);
  plan.work_bytes = work_bytes(linear.k_padded) / 64 * 64;
  plan.work = kernels.scratch(kWork, plan.work_bytes * kernels.threads.size());
  constexpr int kDecoding = 64;  // rows; beyond, reading weights hardly matters
  if (kernels.last && kernels.last->weights != linear.weights)
    *kernels.last = {linear.weights, linear.panel_bytes, linear.num_panels};
  kernels.last = linear.following;
  plan.following = rows <= kDecoding ? linear.following.get() : nullptr;
  ops.project(plan);
  if (plan.following) kernels.reading = linear.following->weights;  // the threads have let go of the one before
}

void norm(Kernels& kernels, const float* x, int rows, int features, const Norm& norm, float* y, bool add) {
  std::lock_guard lock(kernels.busy);
  linear_ops(kernels.isa).norm(kernels.threads, x, rows, features, norm, y, add);
}

}  // namespace chiliad
