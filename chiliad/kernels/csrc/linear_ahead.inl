// Rank rows are read where they lie, in pages of the pool: where a page ends, so does every pattern that
// the processor could see. So whoever will read them asks for their lines in time.
#pragma once

#include "linear_common.h"

namespace chiliad {
namespace {

// Phase 1 reads the rank rows of its tasks in their order. Whoever reads lines for the first time asks
// for as many of those that come later, so that the distance stays the same.
class Ahead {
 public:
  explicit Ahead(const ProjectPlan& plan) : plan_(plan) {}

  // Before a task is worked on. If it follows the last one, its first lines were asked for.
  void begin(const Task* task) {
    const bool follows = task == expected_;
    expected_ = task + 1;
    if (follows) return;
    next_ = plan_.stretches + task->stretch;
    rest_.lines = 0;
    fetch(kDistance);
  }

  CHILIAD_INLINE void fetch(int lines) {
    while (lines > rest_.lines) {
      lines -= static_cast<int>(rest_.lines);
      ask(static_cast<int>(rest_.lines));
      rest_.lines = 0;
      if (next_ == plan_.stretches_end) return;
      rest_ = *next_++;
    }
    ask(lines);
    rest_.lines -= lines;
  }

 private:
  static constexpr int kDistance = kAmx ? 320 : 160;  // lines, measured
  static constexpr int kLocality = kAmx ? 2 : 3;

  CHILIAD_INLINE void ask(int lines) {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(rest_.at + 64 * i, 0, kLocality);
    rest_.at += 64 * lines;
  }

  const ProjectPlan& plan_;
  const Task* expected_ = nullptr;
  const Stretch* next_ = nullptr;  // not yet begun
  Stretch rest_{};                 // of the one that was
};

// Phase 2 multiplies, and memory waits for it: so it fetches what this worker will read next, some lines
// with each step of 32 k. (AVX512-BF16 does; with AMX, or where bfloat16 is not multiplied, nobody asks.)
class Lookahead {
 public:
  static constexpr int kChunk = 8;  // lines

  // steps: how many this worker will make.
  Lookahead(const ProjectPlan& plan, int worker, std::int64_t steps) {
    if (plan.early == nullptr) return;
    early_ = plan.early + worker;
    const std::int64_t rate = early_->lines * kUnit / kChunk / (steps + 1) + 1;
    rate_ = early_->lines <= 0 ? 0 : rate < kMost ? static_cast<int>(rate) : kMost;
  }

  explicit operator bool() const { return rate_ > 0; }

  // Where to ask for kChunk lines in each of `steps` steps, `none` where there is nothing; false if nowhere.
  bool chunks(int steps, const std::byte* none, const std::byte** to) {
    due_ += steps * rate_;
    int i = 0;
    for (; i < steps && due_ >= kUnit; ++i, due_ -= kUnit) {
      if (early_->rest.lines <= 0) {
        if (early_->next == early_->end) {
          rate_ = due_ = 0;
          break;
        }
        early_->rest = *early_->next++;
      }
      to[i] = reinterpret_cast<const std::byte*>(early_->rest.at);
      const std::int64_t lines = early_->rest.lines < kChunk ? early_->rest.lines : kChunk;
      early_->rest.at += 64 * lines;
      early_->rest.lines -= lines;
      early_->lines -= lines;
    }
    for (int j = i; j < steps; ++j) to[j] = none;
    return i > 0;
  }

 private:
  static constexpr int kUnit = 256;
  static constexpr int kMost = 144;  // measured: with more, the weights themselves come late
  Early* early_ = nullptr;
  int rate_ = 0, due_ = 0;  // chunks per step and owed ones, in 256ths
};

}  // namespace
}  // namespace chiliad
