// AMX tiles, for .inl files where CHILIAD_AMX says that there are some.
//
// `amx_emulated` is `amx` for machines that lack it: the same code, compiled for AVX512-BF16, on the tile
// instructions written out below. Tests want it, wheels do not (CMake: CHILIAD_EMULATE_AMX). It is as strict as
// the hardware: what would fault there ends the process here, and says why (pytest -s). What it cannot show is how the
// compiler orders real tile instructions among ordinary loads and stores (see memory_is_read).
#pragma once

#include "lanes.h"

#if CHILIAD_AMX

#if CHILIAD_EMULATE_AMX
#include <cstdio>
#include <cstdlib>

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#endif

namespace chiliad {

#if CHILIAD_EMULATE_AMX

// The tile registers of a thread, shared by all files: what one op leaves in them, the next one finds, as on
// the hardware. Without a shape (all of them, unless configured) a tile must not be used. Bytes beyond the
// shape are always zero.
struct TileState {
  struct Tile {
    int rows, row_bytes;
    alignas(64) std::uint8_t bytes[16][64];
  } tiles[8];
};
inline constinit thread_local TileState tile_state{};

#endif

namespace {

// What ldtilecfg reads. The eight tiles are full unless told otherwise.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// gcc's tile intrinsics do not say that they read memory (or, of a configuration, only 8 bytes): this
// comes between writing what they read and them.
CHILIAD_INLINE void memory_is_read(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

#if CHILIAD_EMULATE_AMX

[[noreturn]] inline void fault(const char* instruction, const char* why) {
  std::fprintf(stderr, "amx_emulated: %s would fault: %s\n", instruction, why);
  std::abort();
}

inline TileState::Tile& tile_of(const char* instruction, int index) {
  TileState::Tile& tile = tile_state.tiles[index];
  if (tile.rows == 0) fault(instruction, "no configuration gives this tile a shape");
  return tile;
}

inline void _tile_release() { tile_state = {}; }

inline void _tile_loadconfig(const void* from) {
  TileConfig config;
  std::memcpy(&config, from, sizeof(config));
  _tile_release();
  if (config.palette != 1 || config.start_row != 0) fault("ldtilecfg", "not palette 1 from row 0");
  for (std::uint8_t byte : config.reserved)
    if (byte != 0) fault("ldtilecfg", "a reserved byte is not zero");
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], row_bytes = config.row_bytes[i];
    if (rows > 16 || row_bytes > 64 || (rows == 0) != (row_bytes == 0)) fault("ldtilecfg", "no tile has such a shape");
    if (i >= 8 && rows > 0) fault("ldtilecfg", "there are eight tiles");
    if (i < 8) tile_state.tiles[i].rows = rows, tile_state.tiles[i].row_bytes = row_bytes;
  }
}

inline void _tile_zero(int index) {
  TileState::Tile& tile = tile_of("tilezero", index);
  std::memset(tile.bytes, 0, sizeof(tile.bytes));
}

inline void _tile_loadd(int index, const void* from, std::ptrdiff_t stride) {
  TileState::Tile& tile = tile_of("tileloadd", index);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.bytes[r], static_cast<const std::byte*>(from) + r * stride, tile.row_bytes);
}

inline void _tile_stream_loadd(int index, const void* from, std::ptrdiff_t stride) { _tile_loadd(index, from, stride); }

inline void _tile_stored(int index, void* to, std::ptrdiff_t stride) {
  const TileState::Tile& tile = tile_of("tilestored", index);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(static_cast<std::byte*>(to) + r * stride, tile.bytes[r], tile.row_bytes);
}

// c += a * b. Even and odd elements are summed apart, in float32, then together, then added to c; denormals count
// as zeros, and MXCSR's own ways do not count.
inline void _tile_dpbf16ps(int c, int a, int b) {
  TileState::Tile& sums = tile_of("tdpbf16ps", c);
  const TileState::Tile &left = tile_of("tdpbf16ps", a), &right = tile_of("tdpbf16ps", b);
  if (a == b || b == c || c == a) fault("tdpbf16ps", "a tile is used twice");
  if (left.row_bytes % 4 || right.row_bytes % 4 || left.rows != sums.rows || right.row_bytes != sums.row_bytes ||
      left.row_bytes != 4 * right.rows)
    fault("tdpbf16ps", "the shapes do not fit");
  constexpr unsigned kNearestNoDenormals = 0x9fc0;  // round to nearest even, no exceptions
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kNearestNoDenormals);
  memory_is_read(&sums);  // nothing moves out from between these
  for (int m = 0; m < sums.rows; ++m) {
    Vec even = vset(0.0f), odd = vset(0.0f);  // a lane for each column
    const bf16* row = reinterpret_cast<const bf16*>(left.bytes[m]);
    for (int k = 0; k < right.rows; ++k) {
      Vec right_even, right_odd;
      vload_pairs(reinterpret_cast<const bf16*>(right.bytes[k]), right_even, right_odd);
      even = vfma(vset(to_float(row[2 * k])), right_even, even);
      odd = vfma(vset(to_float(row[2 * k + 1])), right_odd, odd);
    }
    float* to = reinterpret_cast<float*>(sums.bytes[m]);
    vstore(to, vload(to) + (even + odd), sums.row_bytes / 4);
  }
  memory_is_read(&sums);
  _mm_setcsr(before);
}

#endif

CHILIAD_INLINE void configure_tiles(const TileConfig& config) {
  memory_is_read(&config);
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace chiliad

#endif
