// Checks and the plan of one `project` call; linear.inl does the arithmetic.
#include "linear.h"

#include <algorithm>

namespace chiliad {

CHILIAD_TABLES(LinearOps, linear_ops)

namespace {

// What one call plans; kept to save allocations. One per thread: an op runs on one thread.
struct Plans {
  std::vector<int> scaled_at;
  std::vector<const std::byte*> tiles;
};

// The next linear of the step that has rank rows, if all goes as it went before.
const Uses* look_ahead(Kernels& kernels, const PackedLinear& linear, const Step& step) {
  constexpr int kMost = 4;  // linears; a layer has as many
  std::shared_ptr<PackedLinear> next = linear.next.lock();
  for (int i = 0; i < kMost && next && next->slots[0] >= 0; ++i, next = next->next.lock()) {
    try {
      if (const Uses& uses = uses_of(kernels, *next, &step); !uses.tasks.empty()) return &uses;
    } catch (const KernelError&) {
      return nullptr;  // it does not come this time, or will say so itself
    }
  }
  return nullptr;
}

// What is left to fetch of its rank rows; each worker's share is that of its tasks.
Early* early(Kernels& kernels, const Uses& uses, const Step& step) {
  if (kernels.early_step != step.serial || kernels.early_uses != uses.made) {
    kernels.early_step = step.serial;
    kernels.early_uses = uses.made;
    const int size = kernels.threads.size();
    const std::int64_t tasks = static_cast<std::int64_t>(uses.tasks.size());
    kernels.early.resize(size);
    auto at = [&](std::int64_t task) {
      return uses.stretches.data() + (task < tasks ? uses.tasks[task].stretch : uses.stretches.size());
    };
    for (std::int64_t worker = 0; worker < size; ++worker)
      kernels.early[worker] = {at(tasks * worker / size), at(tasks * (worker + 1) / size), {}, uses.lines / size};
  }
  return kernels.early.data();
}

// Bytes of an input tile; sums_at: where the sums over groups are, 0 if nobody wants them.
std::size_t tile_bytes(const PackedLinear& linear, const LinearOps& ops, std::size_t& sums_at) {
  sums_at = 0;
  if (linear.dtype == DType::float32) return sizeof(float) * kRowTile * linear.in_features;
  std::size_t bytes = std::size_t{kRowTile} * linear.k_padded * (ops.bf16_tiles ? 2 : sizeof(float));
  if (linear.dtype == DType::int4 && ops.levels) {
    sums_at = bytes;
    bytes += sizeof(float) * kRowTile * linear.k_padded / 32;
  }
  return bytes;
}

}  // namespace

Tiles room_for_inputs(Kernels& kernels, PackedLinear& linear, const Step* step, int rows) {
  std::lock_guard lock(kernels.busy);
  const LinearOps& ops = linear_ops(kernels.isa);
  std::size_t sums_at;
  const std::size_t bytes = tile_bytes(linear, ops, sums_at);
  if (!ops.bf16_tiles || linear.dtype == DType::float32 || linear.in_features % 32 || sums_at) return {};
  const Uses& uses = uses_of(kernels, linear, step);
  if (uses.any_d || uses.any_f32) return {};
  return {kernels.scratch(kTiles, bytes * ((rows + kRowTile - 1) / kRowTile)), bytes};
}

void project(Kernels& kernels, PackedLinear& linear, const Step* step, const float* x, int rows,
             const Norm& norm, Activation activation, float* y, bool add, const Tiles& from, const Tiles& to) {
  if (rows <= 0) return;
  if (step != nullptr && step->num_tokens != rows) throw KernelError("x must have one row per token of the step");
  const bool pair = activation == Activation::silu_mul || activation == Activation::gelu_tanh_mul;
  if (pair && !linear.paired) throw KernelError("this activation needs a linear of two equal projections (gate, up)");
  std::lock_guard lock(kernels.busy);
  const LinearOps& ops = linear_ops(kernels.isa);
  thread_local Plans plans;
  const Uses& uses = uses_of(kernels, linear, step);

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
  plan.y_tiles = to;
  constexpr std::size_t kLarge = std::size_t{4} << 20;
  plan.y_streams = !add && sizeof(float) * rows * plan.y_stride > kLarge && plan.y_stride % 16 == 0 &&
                   reinterpret_cast<std::uintptr_t>(y) % 64 == 0;
  plan.arena = kernels.arena.data;
  plan.uses = uses.uses.data();
  plan.uses_from = uses.from.data();
  plan.tasks = uses.tasks.data();
  plan.num_tasks = static_cast<int>(uses.tasks.size());
  plan.stretches = uses.stretches.data();
  plan.stretches_end = plan.stretches + uses.stretches.size();
  plan.z = reinterpret_cast<float*>(kernels.scratch(kShrunk, uses.shrunk * sizeof(float)));
  if (plan.num_tasks > 0 && rows <= kFewRows)
    plan.delta = reinterpret_cast<float*>(kernels.scratch(kDelta, sizeof(float) * (static_cast<std::size_t>(linear.out_features) * rows + 16)));

  plan.tile_bytes = tile_bytes(linear, ops, plan.sums_at);
  if (norm.kind != NormKind::none && (f32 || uses.any_d || uses.any_f32))
    plan.x32 = reinterpret_cast<float*>(kernels.scratch(kNormed, row_bytes * rows));
  plan.ready = static_cast<bool>(from);
  if (from) plan.input = from.data;
  else if (!f32 || (x == y && norm.kind == NormKind::none)) plan.input = kernels.scratch(kInputs, plan.tile_bytes * row_tiles);
  const std::byte* base = plan.input ? plan.input : reinterpret_cast<const std::byte*>(plan.x32 ? plan.x32 : x);
  plans.tiles.resize(static_cast<std::size_t>(projections) * row_tiles);
  for (int p = 0; p < projections; ++p)
    for (int t = 0; t < row_tiles; ++t) plans.tiles[p * row_tiles + t] = base + t * plan.tile_bytes;
  if (uses.any_d) {
    plans.scaled_at.assign(plans.tiles.size(), -1);
    int count = 0;
    for (int p = 0; p < projections; ++p)
      for (int i = uses.from[p]; i < uses.from[p + 1]; ++i)
        if (uses.uses[i].d != nullptr)
          for (int t = uses.uses[i].start / kRowTile; t <= (uses.uses[i].stop - 1) / kRowTile; ++t)
            if (int& at = plans.scaled_at[p * row_tiles + t]; at < 0) at = count++;
    plan.scaled = kernels.scratch(kScaled, plan.tile_bytes * count);
    plan.scaled_at = plans.scaled_at.data();
    for (std::size_t i = 0; i < plans.tiles.size(); ++i)
      if (plans.scaled_at[i] >= 0) plans.tiles[i] = plan.scaled + plans.scaled_at[i] * plan.tile_bytes;
  }
  plan.tiles = plans.tiles.data();
  if (ops.turned && !f32 && uses.any_bf16) plan.turned = kernels.scratch(kTurned, plan.tile_bytes * row_tiles);
  if (ops.parts && (linear.dtype == DType::int8 || linear.dtype == DType::int4) && rows <= kPartRows && !uses.any_d) {
    plan.part_bytes = std::size_t{2} * linear.k_padded + 8 * (linear.k_padded / 32);
    plan.parts = kernels.scratch(kParts, plan.part_bytes * rows);
  }
  plan.work_bytes = work_bytes(linear.k_padded) / 64 * 64;
  plan.work = kernels.scratch(kWork, plan.work_bytes * kernels.threads.size());
  if (const auto last = kernels.last.lock(); last && last.get() != &linear) last->next = linear.weak_from_this();
  kernels.last = linear.weak_from_this();
  std::shared_ptr<PackedLinear> next;
  if (rows <= kFewRows) {
    next = linear.next.lock();
    if (next) {
      plan.next_weights = next->weights.get();
      plan.next_panel_bytes = next->panel_bytes;
      plan.next_panels = next->num_panels;
    }
    if (const Uses* upcoming = step != nullptr ? look_ahead(kernels, linear, *step) : nullptr)
      plan.early = early(kernels, *upcoming, *step);
    else if (!kernels.early_kv.empty())  // where rank rows take the bandwidth, more would only come late
      plan.early = kernels.early_kv.data();
  }
  ops.project(plan);
  if (next) kernels.reading = next;  // the threads have let go of the one before
}

void norm(Kernels& kernels, const float* x, int rows, int features, const Norm& norm, float* y, bool add) {
  std::lock_guard lock(kernels.busy);
  linear_ops(kernels.isa).norm(kernels.threads, x, rows, features, norm, y, add);
}

}  // namespace chiliad
