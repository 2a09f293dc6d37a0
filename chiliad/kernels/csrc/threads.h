// One pool of threads for one engine. The calling thread is worker 0, the others spin for a
// few tens of microseconds after each job (the gap between two ops of a step) and then sleep,
// so that an idle engine costs nothing and nothing spins against other runtimes.
#pragma once

#include <atomic>
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

  // Run body(worker) on every worker, 0 <= worker < size(), and return when all are done.
  // The body must not throw: check and allocate before. Not reentrant.
  template <class Body>
  void run(const Body& body) {
    launch([](const void* context, int worker) { (*static_cast<const Body*>(context))(worker); }, &body);
  }

  // Inside run: wait until every worker has come here.
  void barrier();

  // Inside run: hand out items [0, count) of the current phase. Each worker first takes from
  // its own contiguous share (so that it walks memory in order), then from the end of others'.
  // Call `share(phase, count)` before run (or between barriers, by one worker) and loop over
  // `next(phase, worker)` until it returns -1. There are kPhases independent counters.
  static constexpr int kPhases = 4;
  void share(int phase, int count);
  int next(int phase, int worker);

  // The same in runs of up to `most` items, shorter towards the end so that all finish together.
  struct Run {
    int first, last;
    explicit operator bool() const { return first < last; }
  };
  Run take(int phase, int worker, int most);

 private:
  using Call = void (*)(const void*, int);
  struct alignas(64) Range {  // low 32 bits: next item from the front; high: end
    std::atomic<std::uint64_t> bounds{0};
  };

  void launch(Call call, const void* context);
  void work(int worker);

  int size_ = 1;
  std::vector<std::thread> workers_;
  std::unique_ptr<Range[]> ranges_;  // [kPhases][size]
  Call call_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  alignas(64) std::atomic<int> pending_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> turn_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace chiliad
