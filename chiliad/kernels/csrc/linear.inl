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
#include "linear_epilogue.inl"
#include "linear_gemm.inl"
#include "linear_wide.inl"

namespace chiliad {
namespace {

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
      Source source = stored ? (row == 0 ? Source::memory : Source::cache) : Source::packed;
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
  const int most = kAmx && plan.k_padded > 1024 ? kWideRows / 2 : kWideRows;  // tiles: the inputs stay in the L2 cache
  const int wanted = 4 * plan.threads->size(), chunks = (wanted + plan.num_panels - 1) / plan.num_panels;
  int rows = (plan.rows + chunks - 1) / chunks;
  rows = rows < 32 ? 32 : (rows + 31) / 32 * 32;
  return rows < most ? rows : most;
}

// A worker's part of phase 2; an item is a chunk of rows and a panel.
void products(const ProjectPlan& plan, int worker, int chunk, std::byte* work) {
  ThreadPool& threads = *plan.threads;
  auto last_row = [&](int first) { return first + chunk < plan.rows ? first + chunk : plan.rows; };
#if CHILIAD_AMX
  if (plan.dtype != DType::float32 && plan.rows > 32)
    return with_finish(plan, [&]<Activation A, bool Add>() {
      Wide<A, Add> wide(plan, work);
      for (int i; (i = threads.next(2, worker)) >= 0;) {
        const int first = i / plan.num_panels * chunk;
        wide(i % plan.num_panels, first, last_row(first));
      }
    });
#endif
  const int most = plan.rows <= 32 ? kGroup : 1;  // a panel that serves many rows stays in the L1 cache
  const std::int64_t passes = (plan.rows + kRows - 1) / kRows;
  Lookahead rank(plan, worker, passes * plan.num_panels * (plan.k_padded / 32) / threads.size());
  while (const ThreadPool::Run run = threads.take(2, worker, most))
    for (int i = run.first; i < run.last;) {
      const int panel = i % plan.num_panels, first = i / plan.num_panels * chunk;
      int panels = plan.num_panels - panel;
      if (panels > run.last - i) panels = run.last - i;
      run_panels(plan, panel, panels, first, last_row(first), work, rank);
      i += panels;
    }
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
  const bool prepare = plan.ready ? plan.turned || plan.parts : plan.input || plan.norm.kind != NormKind::none || plan.scaled;
  threads.share(0, row_tiles);
  threads.share(1, plan.num_tasks);
  threads.share(2, plan.num_panels * chunks);
  threads.run([&](int worker) {
    std::byte* work = plan.work + worker * plan.work_bytes;
    {
      [[maybe_unused]] const Tiling tiling;
      if (prepare) {
        for (int i; (i = threads.next(0, worker)) >= 0;) input_tile(plan, i, reinterpret_cast<float*>(work));
        threads.wait(0);
      }
      if (plan.num_tasks) {
        Ahead ahead(plan);
        while (const ThreadPool::Run run = threads.take(1, worker, 4))
          for (int i = run.first; i < run.last; ++i) low_rank(plan, plan.tasks[i], ahead, work);
        threads.wait(1);
      }
      products(plan, worker, chunk, work);
#if defined(__x86_64__)
      if (plan.y_streams) _mm_sfence();  // nothing else orders such stores
#endif
    }
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

CHILIAD_EXPORT(LinearOps, linear_ops) = {project, norm_rows, kBf16Tiles, kLevels, kAmx, kAmx};

}  // namespace chiliad
