// The state behind one CpuKernels object: instruction set, threads, arena and scratch memory.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "batch.h"
#include "isa.h"
#include "threads.h"

namespace chiliad {

// Becomes chiliad.errors.KernelError in Python.
struct KernelError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// 64-byte aligned memory (2 MB aligned and backed by huge pages where large and possible).
struct Freed {
  void operator()(void* p) const;
};
using Bytes = std::unique_ptr<std::byte, Freed>;
Bytes allocate(std::size_t bytes);  // throws std::bad_alloc; contents are zero

class Kernels {
 public:
  Kernels(const std::string& isa, int threads) : isa(choose_isa(isa)), threads(threads) {}

  const Isa isa;
  ThreadPool threads;
  Arena arena;
  std::mutex busy;  // one op at a time: hold it while using threads or scratch

  // At least `bytes` of scratch, 64-byte aligned, valid until the next call for this index.
  std::byte* scratch(int index, std::size_t bytes);
  static constexpr int kScratches = 8;

 private:
  Bytes scratch_[kScratches];
  std::size_t scratch_bytes_[kScratches] = {};
};

}  // namespace chiliad
