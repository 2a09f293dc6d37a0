// What the parts of linear.inl share. For .inl files only: each instruction set has its own copy.
#pragma once

#include "linear.h"
#include "simd.h"

namespace chiliad {
namespace {

constexpr int kVecs = kBlock / kLanes;  // vectors per block
#if defined(__AMX_BF16__)
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

}  // namespace
}  // namespace chiliad
