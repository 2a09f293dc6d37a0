#include "attention.h"

#include <algorithm>
#include <string>
#include <vector>

namespace chiliad {

CHILIAD_TABLES(AttentionOps, attention_ops)
CHILIAD_TABLES(RopeOps, rope_ops)

namespace {

constexpr std::int64_t kItemBytes = 256 << 10;  // of KV per round of one item: a part of the L2 cache

}  // namespace

void check_step(const Kernels& kernels, const Step& step, int first_layer, int last_layer, int num_heads) {
  const Arena& arena = kernels.arena;
  if (arena.data == nullptr) throw KernelError("bind_arena comes before attention");
  for (int layer : {first_layer, last_layer - 1})
    if (layer < 0 || layer >= arena.num_layers) throw KernelError("layer " + std::to_string(layer) + " is not in the KV layout");
  if (num_heads <= 0 || num_heads % arena.num_kv_heads) throw KernelError("num_heads must be a multiple of num_kv_heads");
  if (step.num_sequences > 0 && step.num_layers != arena.num_layers) throw KernelError("page tables need one column per layer");
  const std::int64_t num_pages = arena.bytes / arena.page_bytes;
  for (int i = 0; i < step.num_sequences; ++i) {
    const int rows = step.row_start[i + 1] - step.row_start[i], context = step.context[i];
    const int blocks = (context + arena.block_tokens - 1) / arena.block_tokens;
    if (rows > context || blocks > step.num_blocks[i] || step.positions[step.row_start[i]] != context - rows)
      throw KernelError("sequence " + std::to_string(i) + ": context, positions and page table do not fit");
    for (int b = 0; b < blocks; ++b)
      for (int layer = first_layer; layer < last_layer; ++layer) {
        const std::int64_t page = step.page_tables[i][std::int64_t{b} * arena.num_layers + layer];
        if (page < 0 || page >= num_pages) throw KernelError("page " + std::to_string(page) + " is not in the arena");
      }
  }
}

void fetch_kv(Kernels& kernels, const Step& step, int layer, int window) {
  constexpr std::int64_t kMost = 32768;  // lines of a worker: 2 MB, as much as a layer's products can ask for
  constexpr int kRows = 8;               // products of so few wait for memory themselves
  kernels.early_kv.clear();
  kernels.kv_pages.clear();
  if (kernels.isa != Isa::avx512bf16) return;  // the others do not ask (see Lookahead)
  if (step.num_tokens <= kRows || step.num_tokens > kFewRows) return;
  const Arena& arena = kernels.arena;
  const int block = arena.block_tokens, workers = kernels.threads.size();
  const std::int64_t lines = std::int64_t{2} * arena.num_kv_heads * arena.head_dim * block * item_bytes(arena.kv_dtype) / 64;
  std::vector<Stretch>& pages = kernels.kv_pages;
  static thread_local std::vector<std::size_t> first;  // page of each worker: attention gives each as many sequences
  first.assign(1, 0);
  for (std::int64_t worker = 0; worker < workers; ++worker) {
    for (std::int64_t i = step.num_sequences * worker / workers; i < step.num_sequences * (worker + 1) / workers; ++i) {
      const int start = step.context[i] - (step.row_start[i + 1] - step.row_start[i]);
      const int low = window > 0 ? std::max(start - window + 1, 0) / block : 0;
      const int high = (start + block - 1) / block;
      for (int b = low; b < high && static_cast<std::int64_t>(pages.size() - first.back()) * lines < kMost; ++b)
        pages.push_back({arena.data + step.page_tables[i][std::int64_t{b} * arena.num_layers + layer] * arena.page_bytes, lines});
    }
    first.push_back(pages.size());
  }
  for (int worker = 0; worker < workers; ++worker) {
    const Stretch *from = pages.data() + first[worker], *to = pages.data() + first[worker + 1];
    kernels.early_kv.push_back({from, to, {}, (to - from) * lines});
  }
}

void attention(Kernels& kernels, const Step& step, int layer, const float* qkv, int num_heads, float scale,
               int window, float* out, const Tiles& tiles_out) {
  const Arena& arena = kernels.arena;
  const AttentionOps& ops = attention_ops(kernels.isa);
  const int block = arena.block_tokens, head_dim = arena.head_dim, group = num_heads / arena.num_kv_heads;
  AttentionCall call{};
  call.q = qkv;
  call.q_stride = (std::int64_t{num_heads} + 2 * arena.num_kv_heads) * head_dim;
  call.out = out;
  call.out_tiles = tiles_out;
  call.arena = arena.data;
  call.page_bytes = arena.page_bytes;
  call.table_stride = arena.num_layers;
  call.num_heads = num_heads;
  call.num_kv_heads = arena.num_kv_heads;
  call.head_dim = head_dim;
  call.block_tokens = block;
  call.bfloat16 = arena.kv_dtype == DType::bfloat16;
  call.scale = scale;
  call.window = window;
  call.span = std::min(block, kStepTokens);
  while (block % call.span || call.span % 16) call.span -= 1;
  call.step = kStepTokens / call.span * call.span;
  call.split = std::max(512 / call.step, 1) * call.step;

  // Decoding reads memory more than it computes: a sequence's heads go together, because a page
  // holds them one after the other, unless the threads would lack work.
  const int workers = kernels.threads.size();
  const std::int64_t head_bytes = std::int64_t{2} * call.step * head_dim * item_bytes(arena.kv_dtype);
  int pieces = 0;  // of decoding work, when long contexts are cut as well
  for (int i = 0; i < step.num_sequences; ++i)
    if (step.row_start[i + 1] - step.row_start[i] == 1) pieces += (step.context[i] + call.split - 1) / call.split;
  call.item_heads = static_cast<int>(std::clamp<std::int64_t>(kItemBytes / head_bytes, 1, arena.num_kv_heads));
  while (call.item_heads > 1 && pieces * (arena.num_kv_heads / call.item_heads) < 4 * workers) --call.item_heads;

  static thread_local std::vector<AttentionTile> tiles, parts, long_tiles;  // whole; splits of long ones; those
  static thread_local std::vector<int> first_part;                          // of each long tile
  tiles.clear(), parts.clear(), long_tiles.clear(), first_part.clear();
  for (int i = 0; i < step.num_sequences; ++i) {
    const int rows = step.row_start[i + 1] - step.row_start[i], start = step.context[i] - rows;
    const int heads = rows == 1 ? call.item_heads : 1;
    for (int head = 0; head < arena.num_kv_heads; head += heads)
      for (int flat = 0; flat < rows * group; flat += kTileRows) {
        AttentionTile tile{step.page_tables[i] + layer, step.row_start[i], start, head,
                           std::min(head + heads, arena.num_kv_heads), flat, std::min(flat + kTileRows, rows * group), 0, 0};
        const int low = window > 0 ? std::max(start + tile.begin / group - window + 1, 0) : 0;
        tile.first_split = low / call.split;
        tile.last_split = (start + (tile.end - 1) / group) / call.split + 1;
        tiles.push_back(tile);
      }
  }
  // Too few tiles to keep every thread busy: hand out the splits of the long ones.
  if (workers > 1 && static_cast<int>(tiles.size()) < 4 * workers) {
    static thread_local std::vector<AttentionTile> whole;
    whole.clear();
    for (const AttentionTile& tile : tiles) {
      if (tile.last_split - tile.first_split < 2) {
        whole.push_back(tile);
        continue;
      }
      long_tiles.push_back(tile);
      first_part.push_back(static_cast<int>(parts.size()));
      for (int split = tile.first_split; split < tile.last_split; ++split) {
        parts.push_back(tile);
        parts.back().first_split = split;
        parts.back().last_split = split + 1;
      }
    }
    tiles.swap(whole);
  }
  const int num_parts = static_cast<int>(parts.size());
  parts.insert(parts.end(), tiles.begin(), tiles.end());

  const std::int64_t state = state_floats(head_dim) * call.item_heads;
  const std::int64_t each = (ops.scratch_floats(head_dim, call.item_heads) + 31) / 32 * 32;
  float* scratch = reinterpret_cast<float*>(
      kernels.scratch(kWork, sizeof(float) * (each * workers + state * num_parts)));
  float* partial = scratch + each * workers;
  ThreadPool& threads = kernels.threads;
  const int num_items = static_cast<int>(parts.size());
  const AttentionTile *items = parts.data(), *longs = long_tiles.data();
  const int* first = first_part.data();
  threads.share(0, num_items);
  threads.share(1, static_cast<int>(long_tiles.size()));
  threads.run([&](int worker) {
    float* mine = scratch + each * worker;
    for (int i; (i = threads.next(0, worker)) >= 0;)
      ops.tile(call, items[i], i + 1 < num_items ? items + i + 1 : nullptr, mine,
               i < num_parts ? partial + state * i : nullptr);
    if (num_parts == 0) return;
    threads.wait(0);
    for (int i; (i = threads.next(1, worker)) >= 0;) ops.merge(call, longs[i], mine, partial + state * first[i]);
  });
}

void rope_kv(Kernels& kernels, const Step& step, int layer, float* qkv, int num_heads, const Rope& rope,
             const Norm& q_norm, const Norm& k_norm) {
  const Arena& arena = kernels.arena;
  const RopeOps& ops = rope_ops(kernels.isa);
  RopeCall call{};
  call.qkv = qkv;
  call.cos = rope.cos;
  call.sin = rope.sin;
  call.half = rope.half;
  call.q_norm = q_norm;
  call.k_norm = k_norm;
  call.num_heads = num_heads;
  call.arena = arena.data;
  call.page_bytes = arena.page_bytes;
  call.num_kv_heads = arena.num_kv_heads;
  call.head_dim = arena.head_dim;
  call.block_tokens = arena.block_tokens;
  call.bfloat16 = arena.kv_dtype == DType::bfloat16;
  static thread_local std::vector<RopeItem> items;
  items.clear();
  for (int i = 0; i < step.num_sequences; ++i) {
    if (call.cos != nullptr && step.context[i] > rope.max_position)
      throw KernelError("position " + std::to_string(step.context[i] - 1) + " is beyond the rope table");
    int row = step.row_start[i];
    const int stop = step.row_start[i + 1];
    int position = step.context[i] - (stop - row);
    while (row < stop) {
      const int in_page = std::min(stop - row, arena.block_tokens - position % arena.block_tokens);
      items.push_back({row, row + in_page, position,
                       step.page_tables[i][std::int64_t{position / arena.block_tokens} * arena.num_layers + layer]});
      row += in_page;
      position += in_page;
    }
  }
  ThreadPool& threads = kernels.threads;
  const RopeItem* at = items.data();
  threads.share(0, static_cast<int>(items.size()));
  threads.run([&](int worker) {
    for (int i; (i = threads.next(0, worker)) >= 0;) ops.item(call, at[i]);
  });
}

}  // namespace chiliad
