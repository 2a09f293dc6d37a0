#include "threads.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <map>
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
    if (i >= 512) std::this_thread::yield();
  }
}

// Physical core of each CPU this process may use, -1 of others.
std::vector<int> find_cores() {
  std::vector<int> core_of;
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return core_of;
  std::map<std::string, int> cores;  // by the list of hyperthreads that share the core
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = "cpu" + std::to_string(cpu);
    core_of.resize(static_cast<std::size_t>(cpu) + 1, -1);
    core_of[cpu] = cores.try_emplace(siblings, static_cast<int>(cores.size())).first->second;
  }
#endif
  return core_of;
}

int count_cores(const std::vector<int>& core_of) {
  const int most = core_of.empty() ? 0 : *std::max_element(core_of.begin(), core_of.end()) + 1;
  return most > 0 ? most : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

constexpr auto kSpin = std::chrono::microseconds(50);

}  // namespace

ThreadPool::ThreadPool(int threads) : core_of_(find_cores()) {
  size_ = threads > 0 ? threads : count_cores(core_of_);
  shares_ = std::make_unique<Share[]>(static_cast<std::size_t>(size_) * kPhases);
  ahead_ = std::make_unique<Stretch[]>(static_cast<std::size_t>(size_));
  cpu_ = std::make_unique<std::atomic<int>[]>(static_cast<std::size_t>(size_));
  for (int worker = 0; worker < size_; ++worker) cpu_[worker] = -1;
  for (int worker = 1; worker < size_; ++worker) workers_.emplace_back([this, worker] { work(worker); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::launch(Call call, const void* context) {
  if (size_ == 1) return call(context, 0);
#if defined(__linux__)
  cpu_[0].store(sched_getcpu(), std::memory_order_relaxed);
#endif
  call_ = call;
  context_ = context;
  std::uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  if (epoch == 0) epoch = 1;
  open_.store(epoch);
  epoch_.store(epoch);
  epoch_.notify_all();
  call(context, 0);
  // Close, then wait: whoever is not counted yet will find it closed.
  open_.store(0);
  spin([this] { return inside_.load() > 0; });
}

void ThreadPool::work(int worker) {
  std::uint32_t seen = 0;
  Stretch& ahead = ahead_[worker];
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int i = 1; epoch_.load(std::memory_order_acquire) == seen; ++i) {
      if (ahead.at < ahead.end) {
        for (int line = 0; line < 1024; line += 64) static_cast<void>(*static_cast<const volatile std::byte*>(ahead.at + line));
        ahead.at += 1024;
        continue;
      }
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
    inside_.fetch_add(1);
    if (open_.load() == epoch) {
      keep_apart(worker);
      call_(context_, worker);
    } else {
      ahead = {};  // who missed a job does not know whether that memory is still there
    }
    inside_.fetch_sub(1);
  }
}

// Two workers on one core wait for each other, and the system does not always notice while both
// spin. The one with the higher number moves to a core where none was seen, and stays there.
void ThreadPool::keep_apart(int worker) {
#if defined(__linux__)
  const int here = sched_getcpu();
  cpu_[worker].store(here, std::memory_order_relaxed);
  auto core = [&](int cpu) { return cpu >= 0 && cpu < static_cast<int>(core_of_.size()) ? core_of_[cpu] : -1; };
  auto used = [&](int wanted, int workers) {
    for (int other = 0; other < workers; ++other)
      if (other != worker && core(cpu_[other].load(std::memory_order_relaxed)) == wanted) return true;
    return false;
  };
  if (core(here) < 0 || !used(core(here), worker)) return;
  for (int cpu = 0; cpu < static_cast<int>(core_of_.size()); ++cpu)
    if (core(cpu) >= 0 && !used(core(cpu), size_)) {
      cpu_set_t only;
      CPU_ZERO(&only);
      CPU_SET(cpu, &only);
      if (sched_setaffinity(0, sizeof(only), &only) == 0) cpu_[worker].store(cpu, std::memory_order_relaxed);
      return;
    }
#else
  static_cast<void>(worker);
#endif
}

void ThreadPool::share(int phase, int count) {
  for (int worker = 0; worker < size_; ++worker) {
    const std::uint64_t first = static_cast<std::uint64_t>(count) * worker / size_;
    const std::uint64_t last = static_cast<std::uint64_t>(count) * (worker + 1) / size_;
    Share& share = shares_[phase * size_ + worker];
    share.bounds.store(first | (last << 32), std::memory_order_relaxed);
    share.taken = 0;
  }
  phases_[phase].count = count;
  phases_[phase].done.store(0, std::memory_order_relaxed);
}

void ThreadPool::wait(int phase) {
  const Phase& all = phases_[phase];
  if (size_ > 1) spin([&] { return all.done.load(std::memory_order_acquire) < all.count; });
}

int ThreadPool::next(int phase, int worker) {
  const Run run = take(phase, worker, 1);
  return run ? run.first : -1;
}

ThreadPool::Run ThreadPool::take(int phase, int worker, int most) {
  Share& mine = shares_[phase * size_ + worker];
  if (mine.taken) {
    phases_[phase].done.fetch_add(mine.taken, std::memory_order_acq_rel);
    mine.taken = 0;
  }
  for (int i = 0; i < size_; ++i) {
    const int owner = (worker + i) % size_;
    std::atomic<std::uint64_t>& bounds = shares_[phase * size_ + owner].bounds;
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
      if (bounds.compare_exchange_weak(now, then, std::memory_order_relaxed)) {
        mine.taken = count;
        return run;
      }
    }
  }
  return {0, 0};
}

}  // namespace chiliad
