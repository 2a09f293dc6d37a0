// Paged causal attention and the KV writes before it. attention.inl holds the arithmetic, once
// per instruction set; attention.cpp cuts a step into items and hands them to the threads.
#pragma once

#include <cstdint>

#include "batch.h"
#include "kernels.h"
#include "linear.h"

namespace chiliad {

// One call, as the arithmetic sees it. Query rows of one sequence and one KV head are counted
// "flat": row * group + head in group, so that a tile serves prefill rows and GQA groups alike.
struct AttentionCall {
  const float* q;        // [T, q_stride]: the rows' q heads come first
  std::int64_t q_stride;
  float* out;            // [T, num_heads * head_dim]
  Tiles out_tiles;       // instead of out, if there are some
  const std::uint8_t* arena;
  std::int64_t page_bytes, table_stride;  // table_stride: int32s from one block to the next
  int num_heads, num_kv_heads, head_dim, block_tokens;
  bool bfloat16;
  float scale;
  int window;            // 0: none
  int span;              // tokens of a page that are always taken together
  int step;              // tokens per round of the online softmax: a multiple of span
  int split;             // tokens after which a fresh state starts: a multiple of step
  int item_heads;        // most KV heads of an item
};

// Flat rows [begin, end), at most kTileRows, of one sequence and some of its KV heads.
struct AttentionTile {
  const std::int32_t* table;  // page of block 0 in this layer
  int row;                    // the sequence's first row in the step
  int position;               // and its position
  int head_begin, head_end;   // KV heads
  int begin, end;
  int first_split, last_split;  // which parts of the context: [first, last)
};

constexpr int kTileRows = 32;
constexpr int kStepTokens = 128;

struct AttentionOps {
  // Floats of scratch that `tile` and `merge` need.
  std::int64_t (*scratch_floats)(int head_dim, int item_heads);
  // All of the tile's splits, to call.out; or, if `partial` is not null, its one split to
  // partial[heads][state_floats(head_dim)]. `next` is what comes next, or null: its memory is fetched.
  void (*tile)(const AttentionCall&, const AttentionTile&, const AttentionTile* next, float* scratch, float* partial);
  // Combine partial[splits][call.item_heads][state_floats(head_dim)] in order and write call.out.
  void (*merge)(const AttentionCall&, const AttentionTile&, float* scratch, float* partial);
};

// A tile's softmax state per head: per row the maximum, 16 sums and the weighted values.
constexpr std::int64_t state_floats(int head_dim) { return std::int64_t{kTileRows} * (1 + 16 + head_dim); }

// Rotation by position: cos and sin [max_position, half], or null for none.
struct Rope {
  const float *cos = nullptr, *sin = nullptr;
  int half = 0;  // rotary_dim / 2
  std::int64_t max_position = 0;
};

struct RopeCall {
  float* qkv;            // [T, (num_heads + 2 * num_kv_heads) * head_dim]
  const float *cos, *sin;  // as in Rope
  int half;
  Norm q_norm, k_norm;     // per head, weights [head_dim]
  std::uint8_t* arena;
  std::int64_t page_bytes;
  int num_heads, num_kv_heads, head_dim, block_tokens;
  bool bfloat16;
};

// Rows [begin, end) of the step, all in one page.
struct RopeItem {
  int begin, end, position;
  std::int32_t page;
};

struct RopeOps {
  void (*item)(const RopeCall&, const RopeItem&);
};

// Pages and positions of the step fit the arena and its tables in layers [first, last): before anything
// else is called with it. Throws KernelError.
void check_step(const Kernels& kernels, const Step& step, int first_layer, int last_layer, int num_heads);

// Has the products before the attention of this layer fetch KV that it will read.
void fetch_kv(Kernels& kernels, const Step& step, int layer, int window);

// Results go to `tiles`, if there are some, else to `out`.
void attention(Kernels& kernels, const Step& step, int layer, const float* qkv, int num_heads, float scale,
               int window, float* out, const Tiles& tiles = {});
void rope_kv(Kernels& kernels, const Step& step, int layer, float* qkv, int num_heads, const Rope& rope,
             const Norm& q_norm, const Norm& k_norm);

}  // namespace chiliad
