// What the adapters of a step do to a linear: their rank rows and vectors, checked and put in order.
#include <algorithm>

#include "linear.h"

namespace chiliad {

namespace {

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

constexpr int kTaskRows = 64;

void add_rows(Uses& plan, const Arena& arena, const std::int64_t* rows, int count, int lines) {
  for (int j = 0; j < count; ++j) {
    const std::uint8_t* at = arena.data + rows[j];
    if (j > 0 && plan.stretches.back().at + 64 * plan.stretches.back().lines == at)
      plan.stretches.back().lines += lines;
    else
      plan.stretches.push_back({at, lines});
  }
  plan.lines += std::int64_t{count} * lines;
}

void collect(const Arena& arena, const PackedLinear& linear, const Step& step, Uses& plan) {
  int first = 0;
  for (std::size_t p = 0; p < linear.sizes.size(); first += linear.sizes[p++]) {
    for (const Segment& segment : step.segments) {
      if (segment.adapter == nullptr || linear.slots[p] < 0) continue;
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
        use.numbers = plan.numbers.size();
        plan.numbers.insert(plan.numbers.end(), low->a, low->a + low->numbers());
        use.z = plan.shrunk;
        plan.shrunk += static_cast<std::size_t>(use.stop - use.start) * use.rank;
        plan.any_bf16 = plan.any_bf16 || use.dtype == DType::bfloat16;
        plan.any_f32 = plan.any_f32 || use.dtype == DType::float32;
        if (p + 1 == linear.sizes.size()) fetch_next(*low);
      }
      if (vectors != nullptr) {
        use.d = vector_at(arena, vectors->d, linear.in_features, beside);
        use.g = vector_at(arena, vectors->g, linear.sizes[p], beside);
        use.c = vector_at(arena, vectors->c, linear.sizes[p], beside);
        plan.any_d = plan.any_d || use.d;
      }
      plan.uses.push_back(use);
    }
    plan.from.push_back(static_cast<int>(plan.uses.size()));
  }
}

}  // namespace

const Uses& uses_of(Kernels& kernels, PackedLinear& linear, const Step* step) {
  static const Step nothing{};
  const std::uint64_t batch = kernels.batch_of(step);
  Uses& plan = linear.uses;
  if (plan.batch == batch) return plan;
  plan.batch = 0;  // until it is done: an adapter may be refused
  plan.shrunk = 0;
  plan.lines = 0;
  plan.any_d = plan.any_bf16 = plan.any_f32 = false;
  plan.uses.clear();
  plan.tasks.clear();
  plan.stretches.clear();
  plan.numbers.clear();
  plan.from.assign(1, 0);
  collect(kernels.arena, linear, step != nullptr ? *step : nothing, plan);
  const bool few = step != nullptr && step->num_tokens <= kFewRows;
  // Adapter after adapter: what one has for q, k and v lies side by side.
  static thread_local std::vector<Use*> order;
  order.clear();
  for (Use& use : plan.uses) order.push_back(&use);
  std::stable_sort(order.begin(), order.end(), [](const Use* a, const Use* b) { return a->start < b->start; });
  for (Use* at : order) {
    Use& use = *at;
    use.a = plan.numbers.data() + use.numbers;
    use.b = use.a + use.rank;
    use.scale = reinterpret_cast<const float*>(use.b + use.rank);
    for (int row = use.start, next; use.rank > 0 && row < use.stop; row = next) {
      next = std::min((row / kTaskRows + 1) * kTaskRows, use.stop);
      plan.tasks.push_back({&use, row, next - row, static_cast<int>(plan.stretches.size())});
      add_rows(plan, kernels.arena, use.a, use.rank, row_lines(linear.in_features, use.dtype));
      if (few) add_rows(plan, kernels.arena, use.b, use.rank, row_lines(use.size, use.dtype));
    }
  }
  plan.made = new_serial();
  plan.batch = batch;
  return plan;
}

}  // namespace chiliad
