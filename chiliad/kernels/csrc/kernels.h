// The state behind one CpuKernels object: instruction set, threads, arena and scratch memory.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

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

struct PackedLinear;

// A stretch of memory: rank rows that follow each other, or a page of KV.
struct Stretch {
  const std::uint8_t* at;
  std::int64_t lines;  // of 64 bytes
};

// What one worker fetches before the op that reads it is called.
struct alignas(64) Early {
  const Stretch *next = nullptr, *end = nullptr;  // not yet begun
  Stretch rest{};          // of the one that was
  std::int64_t lines = 0;  // left of all
};

// Who uses which scratch memory. Those that live no longer than their call share kWork; kCounts is all
// zero between calls (see sample.h); kActivations lives through the ops of `layers`.
enum Scratch { kInputs, kTiles, kNormed, kScaled, kParts, kShrunk, kTurned, kDelta, kWork, kCounts, kActivations, kScratches };

class Kernels {
 public:
  Kernels(const std::string& isa, int threads) : isa(choose_isa(isa)), threads(threads) {}

  const Isa isa;
  std::shared_ptr<PackedLinear> reading;  // what idle threads may be reading ahead
  std::weak_ptr<PackedLinear> last;       // the linear that was projected last
  ThreadPool threads;  // after what its threads use
  std::vector<Early> early;  // rank rows that the next linear with adapters reads, by worker
  std::uint64_t early_step = 0, early_uses = 0;  // serials of what `early` is for
  std::vector<Early> early_kv;  // KV that the next attention reads, by worker, or empty
  std::vector<Stretch> kv_pages;  // what `early_kv` points to
  Arena arena;  // set by bind
  std::recursive_mutex busy;  // one op at a time, `layers` being one: hold it while using threads or scratch

  void bind(const Arena& arena);

  // A number that steps share when the same rows use the same adapters in the same arena (and both have
  // few rows, or many). Null and steps of the plain base have one of their own.
  std::uint64_t batch_of(const Step* step);

  // Memory for weights, cut from large stretches: a model's many small matrices share huge pages.
  // A stretch lives as long as any piece of it.
  std::shared_ptr<std::byte> keep(std::size_t bytes);

  // At least `bytes` of scratch, 64-byte aligned, valid until the next call for this index.
  std::byte* scratch(Scratch index, std::size_t bytes);

 private:
  // (start, stop, adapter's serial) of the segments with adapters in the last step
  std::vector<std::tuple<int, int, std::uint64_t>> segments_, others_;
  std::uint64_t step_ = 0, batch_ = 0, with_adapters_ = 0;
  bool few_ = false;
  Bytes scratch_[kScratches];
  std::size_t scratch_bytes_[kScratches] = {};
  std::shared_ptr<std::byte> stretch_;
  std::size_t stretch_used_ = 0, stretch_bytes_ = 0;
};

}  // namespace chiliad
