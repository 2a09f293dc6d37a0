// Ceilings of the machine, measured with the engine's own threads: memory reads and flops.
#pragma once

#include "kernels.h"

namespace chiliad {

struct CeilingOps {
  float (*read)(ThreadPool& threads, const float* data, std::size_t count, int ahead);
  double (*multiply)(ThreadPool& threads, bool bfloat16, int rounds);
};

}  // namespace chiliad
