// An adapter's rank rows from its file's contents into the arena.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace chiliad {

enum class FileType : int { float32, bfloat16, float16 };

// A matrix as it lies in memory, finite numbers only. Its row j goes to byte `first + j`-th offset.
struct Matrix {
  const void* data;
  FileType type;
  std::int64_t rows, columns, row_stride, column_stride;  // strides in elements
  float factor;
};

// Write rows times their matrix's factor at byte offsets, one for each row of each matrix in turn,
// as `dtype`. `scale` gets for every row what its numbers in the arena are to be multiplied by: 1,
// but for int8, where the largest becomes 127. On the caller's thread, which need not be the
// engine's: only those rows are touched. Throws KernelError for offsets outside the arena.
void write_rows(const Kernels& kernels, const std::vector<Matrix>& matrices, const std::int64_t* offsets,
                DType dtype, float* scale);

}  // namespace chiliad
