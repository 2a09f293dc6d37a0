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

// Zeroed memory, 64-byte aligned. From 2 MB on it comes straight from the system, on huge pages
// where possible, and is touched only when written.
struct Freed {
  std::size_t mapped = 0;  // bytes, if it came from the system
  void operator()(void* p) const;
};
using Bytes = std::unique_ptr<std::byte, Freed>;
Bytes allocate(std::size_t bytes);  // throws std::bad_alloc

// Have the system give these bytes their memory now, when nobody else wants the processor. What
// is in them stays, and others may use them meanwhile.
void touch(std::uint8_t* data, std::size_t bytes);

class Kernels {
 public:
  Kernels(const std::string& isa, int threads) : isa(choose_isa(isa)), threads(threads) {}

  const Isa isa;
  std::shared_ptr<std::byte> reading;  // what idle threads may be reading ahead
  std::shared_ptr<struct Following> last;  // of the linear that was projected last
  ThreadPool threads;  // after what its threads use
  Arena arena;
  std::mutex busy;  // one op at a time: hold it while using threads or scratch

  // Memory for weights, cut from large stretches: a model's many small matrices share huge pages.
  // A stretch lives as long as any piece of it.
  std::shared_ptr<std::byte> keep(std::size_t bytes);

  // At least `bytes` of scratch, 64-byte aligned, valid until the next call for this index.
  std::byte* scratch(int index, std::size_t bytes);
  static constexpr int kScratches = 8;

 private:
  Bytes scratch_[kScratches];
  std::size_t scratch_bytes_[kScratches] = {};
  std::shared_ptr<std::byte> stretch_;
  std::size_t stretch_used_ = 0, stretch_bytes_ = 0;
};

}  // namespace chiliad
