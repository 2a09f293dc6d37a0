#include "threads.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <set>
#include <string>

#if defined(__linux__)
#include <sched.h>
#endif

namespace chiliad {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spin while `waiting()`, giving the core away now and then: the thread we wait for may need it.
template <class Waiting>
void spin(const Waiting& waiting) {
  for (int i = 0; waiting(); ++i) {
    relax();
    if (i >= 2000) std::this_thread::yield();
  }
}

int physical_cores() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
    std::set<std::string> cores;  // by the list of hyperthreads that share the core
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
      std::string siblings;
      if (!std::getline(file, siblings)) siblings = "cpu" + std::to_string(cpu);
      cores.insert(siblings);
    }
    if (!cores.empty()) return static_cast<int>(cores.size());
  }
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count ? static_cast<int>(count) : 1;
}

constexpr auto kSpin = std::chrono::microseconds(50);

}  // namespace

ThreadPool::ThreadPool(int threads) : size_(threads > 0 ? threads : physical_cores()) {
  ranges_ = std::make_unique<Range[]>(static_cast<std::size_t>(size_) * kPhases);
  for (int worker = 1; worker < size_; ++worker) workers_.emplace_back([this, worker] { work(worker); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::launch(Call call, const void* context) {
  if (size_ > 1) {
    call_ = call;
    context_ = context;
    pending_.store(size_ - 1, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }
  call(context, 0);
  spin([this] { return pending_.load(std::memory_order_acquire) > 0; });
}

void ThreadPool::work(int worker) {
  std::uint32_t seen = 0;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int i = 1; epoch_.load(std::memory_order_acquire) == seen; ++i) {
      relax();
      if (i % 64 == 0 && std::chrono::steady_clock::now() > until) {
        epoch_.wait(seen, std::memory_order_acquire);
        break;
      }
    }
    const std::uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (epoch == seen) continue;
    seen = epoch;
    if (stop_.load()) return;
    call_(context_, worker);
    pending_.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::barrier() {
  if (size_ == 1) return;
  const std::uint32_t turn = turn_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    turn_.fetch_add(1, std::memory_order_release);
  } else {
    spin([&] { return turn_.load(std::memory_order_acquire) == turn; });
  }
}

void ThreadPool::share(int phase, int count) {
  for (int worker = 0; worker < size_; ++worker) {
    const std::uint64_t first = static_cast<std::uint64_t>(count) * worker / size_;
    const std::uint64_t last = static_cast<std::uint64_t>(count) * (worker + 1) / size_;
    ranges_[phase * size_ + worker].bounds.store(first | (last << 32), std::memory_order_relaxed);
  }
}

int ThreadPool::next(int phase, int worker) {
  const Run run = take(phase, worker, 1);
  return run ? run.first : -1;
}

ThreadPool::Run ThreadPool::take(int phase, int worker, int most) {
  for (int i = 0; i < size_; ++i) {
    const int owner = (worker + i) % size_;
    std::atomic<std::uint64_t>& bounds = ranges_[phase * size_ + owner].bounds;
    std::uint64_t now = bounds.load(std::memory_order_relaxed);
    for (;;) {
      const int first = static_cast<int>(now & 0xffffffff), last = static_cast<int>(now >> 32);
      if (first >= last) break;
      const int count = std::clamp((last - first) / 3, 1, most);
      const Run run = i == 0 ? Run{first, first + count} : Run{last - count, last};
      const std::uint64_t then =
          i == 0 ? now + static_cast<std::uint64_t>(count) : now - (static_cast<std::uint64_t>(count) << 32);
      if (size_ == 1) {
        bounds.store(then, std::memory_order_relaxed);
        return run;
      }
      if (bounds.compare_exchange_weak(now, then, std::memory_order_relaxed)) return run;
    }
  }
  return {0, 0};
}

}  // namespace chiliad
