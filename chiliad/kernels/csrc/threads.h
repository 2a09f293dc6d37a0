// One pool of threads for one engine. The calling thread is worker 0, the others spin for a
// few tens of microseconds after each job (the gap between two ops of a step) and then sleep,
// so that an idle engine costs nothing and nothing spins against other runtimes.
//
// Nobody waits for a thread that has nothing to give: a job is done when its items are done. A
// worker that sleeps, or whose core is busy with another process, joins late or not at all.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace chiliad {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // 0: one per physical core this process may use
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Run body(worker) on worker 0 and on those others that come before it has finished, 0 <= worker
  // < size(). Returns when no one is inside. The body takes its work from `next` or `take`; it
  // must not throw: check and allocate before. Not reentrant.
  template <class Body>
  void run(const Body& body) {
    launch([](const void* context, int worker) { (*static_cast<const Body*>(context))(worker); }, &body);
  }

  // Items [0, count) of a phase of the next run. Each worker first takes from its own contiguous
  // share (so that it walks memory in order), then from the end of others'. Call `share` before
  // run, then loop over `next` until it returns -1. There are kPhases independent phases.
  static constexpr int kPhases = 4;
  void share(int phase, int count);
  int next(int phase, int worker);

  // Inside run, after one's own loop over a phase: until all of its items are done.
  void wait(int phase);

  // The same in runs of up to `most` items, shorter towards the end so that all finish together.
  struct Run {
    int first, last;
    explicit operator bool() const { return first < last; }
  };
  Run take(int phase, int worker, int most);

  // Inside run: what this worker may read into its cache while it waits for the next job (the
  // caller keeps the memory alive until then). Worker 0 never waits.
  void read_ahead(int worker, const std::byte* from, std::size_t bytes) { ahead_[worker] = {from, from + bytes}; }

 private:
  using Call = void (*)(const void*, int);
  struct alignas(64) Share {
    std::atomic<std::uint64_t> bounds{0};  // low 32 bits: next item from the front; high: end
    int taken = 0;                         // by this worker, not yet reported as done
  };
  struct alignas(64) Phase {
    std::atomic<int> done{0};
    int count = 0;
  };
  struct alignas(64) Stretch {
    const std::byte *at = nullptr, *end = nullptr;
  };

  void launch(Call call, const void* context);
  void work(int worker);
  void keep_apart(int worker);

  int size_ = 1;
  std::vector<std::thread> workers_;
  std::unique_ptr<Share[]> shares_;   // [kPhases][size]
  std::unique_ptr<Stretch[]> ahead_;  // [size]
  std::vector<int> core_of_;          // physical core of each CPU; empty if unknown
  std::unique_ptr<std::atomic<int>[]> cpu_;  // [size]: where each worker was seen last
  Phase phases_[kPhases];
  Call call_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  alignas(64) std::atomic<std::uint32_t> open_{0};  // the epoch whose job may be entered, or 0
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace chiliad
