// What a step is to the kernels: the arena, adapters in it, and the rows that use them.
// These mirror chiliad/kernels/base.py; bind.cpp fills and checks them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace chiliad {

enum class DType : int { float32, bfloat16, int8, int4 };

inline constexpr int item_bytes(DType dtype) {
  return dtype == DType::float32 ? 4 : dtype == DType::bfloat16 ? 2 : 1;
}

// The pool's buffer and the KV geometry (see "KV layout" in base.py).
struct Arena {
  std::uint8_t* data = nullptr;
  std::int64_t bytes = 0;
  int num_layers = 0, num_kv_heads = 0, head_dim = 0, block_tokens = 0;
  DType kv_dtype = DType::float32;
  std::int64_t page_bytes = 0;
};

// y += sum_j scale[j] * (A_j . x) * B_j, rows at byte offsets in the arena.
struct LowRank {
  int rank = 0;                           // 0: the slot has none
  std::int64_t last_a = -1, last_b = -1;  // the largest offsets, for one bounds check per use
  const std::int64_t *a = nullptr, *b = nullptr;  // [rank], in Adapter::numbers
  const float* scale = nullptr;

  int numbers() const { return 2 * rank + (rank + 1) / 2; }  // in 8 bytes: a, b and scale
};

// No two things ever have the same one; 0 and 1 are nobody's.
inline std::uint64_t new_serial() {
  static std::atomic<std::uint64_t> last{1};
  return ++last;
}

// What elementwise vectors are stored as beside rank rows of a type.
inline constexpr DType vectors_beside(DType rows) { return rows == DType::float32 ? DType::float32 : DType::bfloat16; }

// y = g * (W (d * x) + bias) + c; offsets, or -1 for the identity.
struct Elementwise {
  std::int64_t d = -1, g = -1, c = -1;
};

// One adapter as the kernels see it. A step walks through the slots in their order, with weights
// in between that push everything else out of the caches, so a slot's numbers follow each other
// and those of the slot before.
struct Adapter {
  const std::uint64_t serial = new_serial();
  DType dtype = DType::float32;  // of the rank rows
  std::vector<LowRank> low_ranks;        // by slot
  std::vector<std::int64_t> numbers;     // by slot: offsets of A, of B, then the scales
  std::vector<int> elementwise_at;       // by slot: -1 where it has nothing
  std::vector<Elementwise> elementwises;

  const LowRank* low_rank(int slot) const {
    if (slot < 0 || slot >= static_cast<int>(low_ranks.size()) || low_ranks[slot].rank == 0) return nullptr;
    return &low_ranks[slot];
  }
  const Elementwise* elementwise(int slot) const {
    if (slot < 0 || slot >= static_cast<int>(elementwise_at.size()) || elementwise_at[slot] < 0) return nullptr;
    return &elementwises[elementwise_at[slot]];
  }
};

struct Segment {
  int start, stop;
  const Adapter* adapter;  // null: the plain base
};

constexpr int kFewRows = 64;  // of a step: up to here reading weights and rank rows takes longer than the arithmetic

// One step. The arrays belong to the Python step, which outlives this.
struct Step {
  const std::uint64_t serial = new_serial();
  int num_tokens = 0, num_sequences = 0, num_layers = 0;
  const std::int32_t* positions = nullptr;  // [num_tokens]
  const std::int32_t* row_start = nullptr;  // [num_sequences + 1]
  const std::int32_t* context = nullptr;    // [num_sequences]
  std::vector<const std::int32_t*> page_tables;  // per sequence: [num_blocks, num_layers]
  std::vector<int> num_blocks;                   // per sequence
  std::vector<Segment> segments;                 // cover [0, num_tokens) in order
};

}  // namespace chiliad
