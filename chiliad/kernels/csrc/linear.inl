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
#include "linear_gemm.inl"
#include "linear_inputs.inl"
#include "linear_low_rank.inl"

namespace chiliad {
namespace {

// ---- phase 2: epilogue ----

// What one use does to `count` neighbouring blocks (full ones, or a single one of `width`
// columns) of rows [first, first + rows); c points at them.
template <class T>
void apply(const ProjectPlan& plan, const Use& use, const Block& block, int count, int step, int first, int rows, float* c) {
  using V = std::conditional_t<sizeof(T) == 4, float, bf16>;  // of vectors, see vectors_beside
  if (use.g || use.c)
    for (int b = 0; b < count; ++b)
      for (int v = 0; v * kLanes < block.width; ++v) {
        const int left = block.width - v * kLanes < kLanes ? block.width - v * kLanes : kLanes;
        const int at = block.column + b * kBlock + v * kLanes;
        for (int r = 0; r < rows; ++r) {
          float* p = c + r * kStride + b * step + v * kLanes;
          Vec y = vload(p);
          if (use.g) y = y * vload(reinterpret_cast<const V*>(use.g) + at, left);
          if (use.c) y = y + vload(reinterpret_cast<const V*>(use.c) + at, left);
          vstore(p, y);
        }
      }
  if (use.rank == 0) return;
  if (!plan.delta) {
    const bool full = block.width == kBlock;
    expand_blocks<T, true>(use, plan.arena, plan.z, block.column, full ? count : 0, full ? 0 : block.width, first, rows, c, kStride, step, nullptr);
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
    with_rows(use->dtype, [&]<class T>() { apply<T>(plan, *use, block, count, step, first, last - first, cu); });
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
  if (plan.bias)
    for (int i = 0; i < count * kBlock; i += kLanes) {
      const Vec bias = vload(plan.bias + panel * kPanel + i);
      for (int r = 0; r < rows; ++r) {
        float* p = c + r * kStride + i;
        vstore(p, vload(p) + bias);
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
void run_panels(const ProjectPlan& plan, int panel, int panels, int first, int last, std::byte* work, Lookahead& rank) {
  const int row_tiles = (plan.rows + kRowTile - 1) / kRowTile;
  const bool stored = kLevels || !quantized(plan.dtype);
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
      gemm(plan, p0, row, rows, weights, source, room, rank, c + i * kPanel);
      bool same = true;  // do both blocks see the same inputs?
      for (int t = row / kRowTile; p0 != p1 && t <= (row + rows - 1) / kRowTile; ++t)
        same = same && plan.tiles[p0 * row_tiles + t] == plan.tiles[p1 * row_tiles + t];
      if (!same) {
        gemm(plan, p1, row, rows, weights, stored ? Source::cache : source, room, rank, other);
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
  if (plan.next_weights == nullptr) return plan.threads->read_ahead(worker, nullptr, 0);
  const std::int64_t panels = plan.next_panels, size = plan.threads->size();
  const std::int64_t first = panels * worker / size, last = panels * (worker + 1) / size;
  const std::size_t bytes = static_cast<std::size_t>(last - first) * plan.next_panel_bytes;
  plan.threads->read_ahead(worker, plan.next_weights + first * plan.next_panel_bytes, (bytes < kMost ? bytes : kMost) / 1024 * 1024);
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
      Ahead ahead(plan);
      while (const ThreadPool::Run run = threads.take(1, worker, 4))
        for (int i = run.first; i < run.last; ++i) low_rank(plan, plan.tasks[i], ahead, work);
      threads.wait(1);
    }
    const std::int64_t passes = (plan.rows + kRows - 1) / kRows;
    Lookahead rank(plan, worker, passes * plan.num_panels * (plan.k_padded / 32) / threads.size());
    while (const ThreadPool::Run run = threads.take(2, worker, most))
      for (int i = run.first; i < run.last;) {  // item = chunk of rows, panel
        const int panel = i % plan.num_panels, first = i / plan.num_panels * chunk;
        int panels = plan.num_panels - panel;
        if (panels > run.last - i) panels = run.last - i;
        run_panels(plan, panel, panels, first, first + chunk < plan.rows ? first + chunk : plan.rows, work, rank);
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

CHILIAD_EXPORT(LinearOps, linear_ops) = {project, norm_rows, kBf16Tiles, kLevels, kAmx};

}  // namespace chiliad
