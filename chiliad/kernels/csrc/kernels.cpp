#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

namespace chiliad {

namespace {
constexpr std::size_t kHuge = std::size_t{2} << 20, kStretch = std::size_t{64} << 20;
}

void Freed::operator()(void* p) const {
#if defined(__linux__)
  if (mapped) {
    munmap(p, mapped);
    return;
  }
#endif
  std::free(p);
}

Bytes allocate(std::size_t bytes) {
#if defined(__linux__)
  if (bytes >= kHuge) {
    // ask for more, give back what lies outside of whole huge pages
    const std::size_t rounded = (bytes + kHuge - 1) / kHuge * kHuge;
    void* p = mmap(nullptr, rounded + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    auto* start = static_cast<std::byte*>(p);
    const std::size_t before = (kHuge - reinterpret_cast<std::uintptr_t>(p) % kHuge) % kHuge;
    if (before) munmap(start, before);
    if (before < kHuge) munmap(start + before + rounded, kHuge - before);
#if defined(MADV_HUGEPAGE)
    madvise(start + before, rounded, MADV_HUGEPAGE);
#endif
    return Bytes(start + before, Freed{rounded});
  }
#endif
  const std::size_t rounded = (bytes + 63) / 64 * 64 + 64;
  void* p = std::aligned_alloc(64, rounded);
  if (p == nullptr) throw std::bad_alloc();
  std::memset(p, 0, rounded);
  return Bytes(static_cast<std::byte*>(p));
}

void touch(std::uint8_t* data, std::size_t bytes) {
  // A thread of its own: who has become an idle one may not be allowed to be a normal one again.
  std::thread([=] {
#if defined(__linux__)
    sched_param none{};
    sched_setscheduler(0, SCHED_IDLE, &none);
#endif
    constexpr std::size_t kPage = 4096;
    for (std::size_t at = 0; at < bytes; at += kPage)
      reinterpret_cast<std::atomic<std::uint8_t>*>(data + at)->fetch_or(0, std::memory_order_relaxed);
  }).join();
}

void Kernels::bind(const Arena& to) {
  std::lock_guard lock(busy);
  arena = to;
  segments_.clear();
  step_ = 0;
}

std::uint64_t Kernels::batch_of(const Step* step) {
  constexpr std::uint64_t kPlain = 1;
  if (step == nullptr) return kPlain;
  if (step->serial == step_) return batch_;
  others_.clear();
  for (const Segment& segment : step->segments)
    if (segment.adapter != nullptr) others_.emplace_back(segment.start, segment.stop, segment.adapter->serial);
  const bool few = step->num_tokens <= kFewRows;
  if (others_ != segments_ || few != few_) {
    segments_.swap(others_);
    few_ = few;
    with_adapters_ = new_serial();
  }
  step_ = step->serial;
  return batch_ = segments_.empty() ? kPlain : with_adapters_;
}

std::shared_ptr<std::byte> Kernels::keep(std::size_t bytes) {
  const std::size_t rounded = (bytes + 63) / 64 * 64;
  if (rounded > kStretch / 4) return allocate(rounded);
  if (stretch_used_ + rounded > stretch_bytes_) {
    stretch_ = allocate(kStretch);
    stretch_used_ = 0;
    stretch_bytes_ = kStretch;
  }
  std::shared_ptr<std::byte> piece(stretch_, stretch_.get() + stretch_used_);
  stretch_used_ += rounded;
  return piece;
}

std::byte* Kernels::scratch(Scratch index, std::size_t bytes) {
  if (bytes > scratch_bytes_[index]) {
    scratch_[index] = allocate(bytes + bytes / 4);
    scratch_bytes_[index] = bytes + bytes / 4;
  }
  return scratch_[index].get();
}

}  // namespace chiliad
