#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace chiliad {

CHILIAD_TABLES(SampleOps, sample_ops)

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// More likely first, ties by id.
bool before(const Candidate& a, const Candidate& b) { return a.y > b.y || (a.y == b.y && a.id < b.id); }

struct Crossing {
  std::int32_t id = -1;  // the token whose weight brings the sum to the target; -1: none does
  double mass = 0;       // the sum with it
};

// Take candidates (by rising id) in order until their summed weight reaches `target`, or exceeds
// it if `beyond`. No sorting of many: weights are summed by buckets of y, then within one bucket.
// `room` holds as many candidates again.
Crossing cross(Candidate* at, int count, double target, bool beyond, Candidate* room) {
  constexpr int kBuckets = 512, kFew = 48;
  const auto reached = [&](double sum) { return beyond ? sum > target : sum >= target; };
  double sum = 0;
  while (count > kFew) {
    float low = kInfinity, high = -kInfinity;
    for (int i = 0; i < count; ++i) {
      low = std::min(low, at[i].y);
      high = std::max(high, at[i].y);
    }
    if (low == high) break;  // equals are in order: by id
    const float scale = (kBuckets - 1) / (high - low);
    const auto bucket_of = [&](const Candidate& c) { return static_cast<int>((high - c.y) * scale); };
    double masses[kBuckets] = {};
    for (int i = 0; i < count; ++i) masses[bucket_of(at[i])] += at[i].weight;
    int bucket = 0;
    while (bucket < kBuckets && !reached(sum + masses[bucket])) sum += masses[bucket++];
    if (bucket == kBuckets) return {-1, sum};
    int members = 0;
    for (int i = 0; i < count; ++i)
      if (bucket_of(at[i]) == bucket) room[members++] = at[i];
    at = room;
    count = members;
  }
  if (count <= kFew) std::sort(at, at + count, before);
  for (int i = 0; i < count; ++i)
    if (reached(sum += at[i].weight)) return {at[i].id, sum};
  // a bucket's sum and the sum of its members differ by rounding: its last member
  return count > 0 && at == room ? Crossing{at[count - 1].id, sum} : Crossing{-1, sum};
}

struct Touched {  // a logit before it was adjusted
  std::int32_t id;
  float before;
};

// The work on one row. `candidates` has room for the vocabulary and `tops` for its chunks, twice;
// `counts` [vocab] is all zero before and after.
class Row {
 public:
  Row(const SampleOps& ops, float* x, int vocab, const SampleRow& row, Candidate* candidates, float* tops,
      std::int32_t* counts, Touched* touched)
      : ops_(ops), x_(x), vocab_(vocab), row_(row), at_(candidates), room_(candidates + vocab), tops_(tops),
        counts_(counts), touched_(touched) {}

  void run(std::int32_t* token, float* logprob, std::int32_t* top_ids, float* top_logprobs) {
    double log_sum = 0;
    float raw_peak = 0;
    if (row_.logprobs >= 0) {
      look();
      raw_peak = peak_;
      log_sum = std::log(ops_.mass(x_, vocab_, peak_, 1.0f));
      best(top_ids, top_logprobs, raw_peak, static_cast<float>(log_sum));
    }
    const bool changed = adjust();
    if (changed || row_.logprobs < 0) look();
    if (nan_ || !std::isfinite(peak_))
      *token = -1;
    else
      *token = row_.temperature == 0 || !std::isfinite(peak_ / row_.temperature) ? argmax() : draw();
    restore();
    *logprob = row_.logprobs < 0 ? 0.0f : *token < 0 ? kNaN : x_[*token] - raw_peak - static_cast<float>(log_sum);
  }

 private:
  void look() { peak_ = ops_.peak(x_, vocab_, tops_, &nan_); }

  // The first of the largest.
  std::int32_t argmax() const {
    int chunk = 0;
    while (tops_[chunk] != peak_) ++chunk;
    return static_cast<std::int32_t>(std::find(x_ + chunk * kChunk, x_ + vocab_, peak_) - x_);
  }

  // A limit that at least `wanted` logits reach, in a few microseconds: the chunks' largest do.
  float limit_for(int wanted) {
    const int chunks = (vocab_ + kChunk - 1) / kChunk;
    if (wanted > chunks) return -kInfinity;
    float* sorted = tops_ + chunks;
    std::copy(tops_, tops_ + chunks, sorted);
    std::nth_element(sorted, sorted + wanted - 1, sorted + chunks, std::greater<float>());
    const float limit = sorted[wanted - 1];
    return limit - std::max(std::abs(limit) * 1e-6f, 1e-30f);  // logits that tie after division by the temperature
  }

  void best(std::int32_t* ids, float* logprobs, float raw_peak, float log_sum) {
    const int k = std::min(row_.logprobs, vocab_);
    if (k == 0) return;
    const float limit = limit_for(k);
    const int count = ops_.collect(x_, vocab_, tops_, limit, kNaN, 1.0f, raw_peak, at_);
    for (int i = 0; i < count; ++i) at_[i].y = x_[at_[i].id] - raw_peak - log_sum;
    const int found = std::min(k, count);  // fewer only if the row holds NaN
    std::partial_sort(at_, at_ + found, at_ + count, before);
    for (int i = 0; i < k; ++i) {
      ids[i] = i < found ? at_[i].id : 0;
      logprobs[i] = i < found ? at_[i].y : kNaN;
    }
  }

  // Penalties, bias and bans, in place; what was there is kept in `touched_`.
  bool adjust() {
    constexpr std::int32_t kSeen = 1 << 30;
    const bool repetition = row_.repetition != 1.0f;
    const auto touch = [&](std::int32_t id) { touched_[num_touched_++] = {id, x_[id]}; };
    for (std::int64_t i = 0; i < row_.output.count; ++i) {
      const std::int32_t id = row_.output.at[i];
      if (counts_[id]++ == 0) touch(id);
    }
    if (repetition)
      for (std::int64_t i = 0; i < row_.prompt.count; ++i) {
        const std::int32_t id = row_.prompt.at[i];
        if (counts_[id] == 0) touch(id), counts_[id] = kSeen;
      }
    for (int i = 0; i < num_touched_; ++i) {
      const std::int32_t id = touched_[i].id;
      float& x = x_[id];
      if (repetition) x = x > 0 ? x / row_.repetition : x * row_.repetition;
      if (const std::int32_t count = counts_[id] & ~kSeen; count > 0) {
        const float penalty = row_.frequency * static_cast<float>(count) + row_.presence;
        x -= penalty;
      }
      counts_[id] = 0;
    }
    for (std::int64_t i = 0; i < row_.bias_ids.count; ++i) {
      const std::int32_t id = row_.bias_ids.at[i];
      touch(id);
      x_[id] += row_.bias[i];
    }
    for (std::int64_t i = 0; i < row_.banned.count; ++i) {
      const std::int32_t id = row_.banned.at[i];
      touch(id);
      x_[id] = -kInfinity;
    }
    return num_touched_ > 0;
  }

  void restore() {
    while (num_touched_ > 0) {
      --num_touched_;
      x_[touched_[num_touched_].id] = touched_[num_touched_].before;
    }
  }

  // Candidates with x >= limit; those that may tie with a missing one are left out.
  int gather(float limit) {
    const float t = row_.temperature;
    return ops_.collect(x_, vocab_, tops_, limit, limit / t, t, peak_ / t, at_);
  }

  // Top-k, top-p and min-p each keep the first so many tokens in order, so that the least of their
  // masses is that of what all of them keep.
  std::int32_t draw() {
    const bool nucleus = row_.top_p < 1, floor = row_.min_p > 0;
    int count;
    double mass = 0;  // of what may be drawn
    if (row_.top_k > 0 && row_.top_k < vocab_) {
      count = gather(limit_for(row_.top_k));
      if (count > row_.top_k) {
        std::nth_element(at_, at_ + row_.top_k, at_ + count, before);
        count = row_.top_k;
        std::sort(at_, at_ + count, [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
      }
      for (int i = 0; i < count; ++i) mass += at_[i].weight;
    } else {
      count = gather_mass(nucleus, floor, &mass);
    }
    if (nucleus) mass = cross(at_, count, row_.top_p * mass, false, room_).mass;
    if (floor) {
      double kept = 0;
      for (int i = 0; i < count; ++i)
        if (at_[i].weight >= row_.min_p) kept += at_[i].weight;
      if (kept > 0) mass = nucleus ? std::min(mass, kept) : kept;
    }
    const Crossing drawn = cross(at_, count, row_.uniform * mass, true, room_);
    if (drawn.id >= 0) return drawn.id;
    // rounding left the draw beyond the sum: the least likely token that is possible at all
    const Candidate* least = nullptr;
    for (int i = 0; i < count; ++i)
      if (at_[i].weight > 0 && (least == nullptr || before(*least, at_[i]))) least = at_ + i;
    return least == nullptr ? argmax() : least->id;
  }

  // Without top-k: enough of the most likely tokens to decide, and the mass of the whole row (with
  // min-p alone, which keeps few, that is not needed).
  int gather_mass(bool nucleus, bool floor, double* mass) {
    const float t = row_.temperature;
    const double last = floor ? -std::log(static_cast<double>(row_.min_p)) + 1e-3 : kInfinity;
    if (floor && !nucleus) return gather(static_cast<float>(peak_ - last * t));
    *mass = ops_.mass(x_, vocab_, peak_, 1.0f / t);
    const double wanted = (nucleus ? row_.top_p : row_.uniform) * *mass * (1 + 1e-6);
    for (double depth = 4;; depth *= 1.5) {  // nats below the top
      const bool all = depth >= last || depth > 100;
      const int count = gather(static_cast<float>(peak_ - (all ? last : depth) * t));
      double have = 0;
      for (int i = 0; i < count; ++i) have += at_[i].weight;
      if (all || have > wanted) return count;
    }
  }

  const SampleOps& ops_;
  float* x_;
  const int vocab_;
  const SampleRow& row_;
  Candidate *at_, *room_;
  float* tops_;
  std::int32_t* counts_;
  float peak_ = 0;
  bool nan_ = false;
  Touched* touched_;
  int num_touched_ = 0;
};

void check(Ids ids, int vocab) {
  for (std::int64_t i = 0; i < ids.count; ++i)
    if (ids.at[i] < 0 || ids.at[i] >= vocab)
      throw KernelError("token id " + std::to_string(ids.at[i]) + " is outside the vocabulary of " + std::to_string(vocab));
}

}  // namespace

void sample(Kernels& kernels, float* logits, int vocab, const std::vector<SampleRow>& rows, std::int32_t* tokens,
            float* logprob, std::int32_t* top_ids, float* top_logprobs, int top_width) {
  for (const SampleRow& row : rows)
    for (const Ids ids : {row.prompt, row.output, row.bias_ids, row.banned}) check(ids, vocab);
  ThreadPool& threads = kernels.threads;
  const SampleOps& ops = sample_ops(kernels.isa);
  const std::size_t chunks = (static_cast<std::size_t>(vocab) + kChunk - 1) / kChunk;
  std::int64_t most = vocab;  // touched logits: each id once, and again where biased or banned
  for (const SampleRow& row : rows) most = std::max(most, vocab + row.bias_ids.count + row.banned.count);
  const std::size_t touched_at = 2 * vocab * sizeof(Candidate), tops_at = touched_at + most * sizeof(Touched);
  const std::size_t each = (tops_at + 2 * chunks * sizeof(float) + 63) / 64 * 64;
  std::byte* scratch = kernels.scratch(kWork, each * threads.size());
  std::byte* counts = kernels.scratch(kCounts, sizeof(std::int32_t) * vocab * threads.size());
  threads.share(0, static_cast<int>(rows.size()));
  threads.run([&](int worker) {
    std::byte* mine = scratch + each * worker;
    std::int32_t* seen = reinterpret_cast<std::int32_t*>(counts) + std::int64_t{vocab} * worker;
    for (int i; (i = threads.next(0, worker)) >= 0;)
      Row(ops, logits + std::int64_t{i} * vocab, vocab, rows[i], reinterpret_cast<Candidate*>(mine),
          reinterpret_cast<float*>(mine + tops_at), seen, reinterpret_cast<Touched*>(mine + touched_at))
          .run(tokens + i, logprob + i, top_ids + std::int64_t{i} * top_width, top_logprobs + std::int64_t{i} * top_width);
  });
}

}  // namespace chiliad
