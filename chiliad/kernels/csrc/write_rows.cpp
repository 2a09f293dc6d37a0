#include "write_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace chiliad {
namespace {

float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <FileType type, class T>
float value(T x) {
  if constexpr (type == FileType::float32) {
    return x;
  } else if constexpr (type == FileType::bfloat16) {
    return from_bits(static_cast<std::uint32_t>(x) << 16);
  } else {  // float16, finite: its exponent in a float32's place is 112 too small, subnormal or not
    const float magnitude = from_bits(static_cast<std::uint32_t>(x & 0x7fff) << 13) * 0x1p112f;
    return x & 0x8000 ? -magnitude : magnitude;
  }
}

template <FileType type, class T>
void gather(const Matrix& m, std::int64_t row, float* to) {
  const T* from = static_cast<const T*>(m.data) + row * m.row_stride;
  if (m.column_stride == 1)
    for (std::int64_t i = 0; i < m.columns; ++i) to[i] = value<type>(from[i]) * m.factor;
  else
    for (std::int64_t i = 0; i < m.columns; ++i) to[i] = value<type>(from[i * m.column_stride]) * m.factor;
}

void gather(const Matrix& m, std::int64_t row, float* to) {
  switch (m.type) {
    case FileType::float32: return gather<FileType::float32, float>(m, row, to);
    case FileType::bfloat16: return gather<FileType::bfloat16, std::uint16_t>(m, row, to);
    case FileType::float16: return gather<FileType::float16, std::uint16_t>(m, row, to);
  }
}

float store(const float* x, std::int64_t n, DType dtype, std::uint8_t* to) {
  if (dtype == DType::float32) {
    std::memcpy(to, x, n * sizeof(float));
    return 1.0f;
  }
  if (dtype == DType::bfloat16) {
    auto* y = reinterpret_cast<std::uint16_t*>(to);
    for (std::int64_t i = 0; i < n; ++i) {  // to nearest, ties to even
      std::uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      y[i] = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    return 1.0f;
  }
  float largest = 1e-30f;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float scale = largest / 127;
  auto* y = reinterpret_cast<std::int8_t*>(to);
  for (std::int64_t i = 0; i < n; ++i) y[i] = static_cast<std::int8_t>(std::nearbyint(x[i] / scale));
  return scale;
}

}  // namespace

void write_rows(const Kernels& kernels, const std::vector<Matrix>& matrices, const std::int64_t* offsets,
                DType dtype, float* scale) {
  std::vector<float> row;
  for (const Matrix& m : matrices) {
    const std::int64_t bytes = m.columns * item_bytes(dtype);
    row.resize(m.columns);
    for (std::int64_t j = 0; j < m.rows; ++j, ++offsets, ++scale) {
      if (*offsets < 0 || *offsets % 64 || *offsets > kernels.arena.bytes - bytes)
        throw KernelError("a rank row must lie in the arena, at a multiple of 64 bytes");
      gather(m, j, row.data());
      *scale = store(row.data(), m.columns, dtype, kernels.arena.data + *offsets);
    }
  }
}

}  // namespace chiliad
