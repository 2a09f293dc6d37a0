// What the parts of linear.inl share. For .inl files only: each instruction set has its own copy.
#pragma once

#include <type_traits>

#include "linear.h"
#include "tiles.h"

namespace chiliad {
namespace {

constexpr int kVecs = kBlock / kLanes;  // vectors per block
#if CHILIAD_AMX
constexpr bool kAmx = true, kBf16Tiles = true;
#elif defined(__AVX512BF16__)
constexpr bool kAmx = false, kBf16Tiles = true;
#else
constexpr bool kAmx = false, kBf16Tiles = false;
#endif
// Rows per pass of a GEMM: as many accumulators (rows x 32 columns) as fit the registers.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 3;
#else
constexpr int kRows = 1;
#endif

// f.operator()<T>() with the type of an adapter's rank rows.
template <class F>
CHILIAD_INLINE void with_rows(DType dtype, const F& f) {
  if (dtype == DType::float32) return f.template operator()<float>();
  if (dtype == DType::bfloat16) return f.template operator()<bf16>();
  f.template operator()<std::int8_t>();
}

}  // namespace
}  // namespace chiliad
