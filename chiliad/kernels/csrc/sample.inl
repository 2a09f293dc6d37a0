// The passes over a whole row of logits; everything after them sees few candidates.
#include "lanes.h"
#include "sample.h"

namespace chiliad {
namespace {

float peak(const float* x, int n, float* tops, bool* nan) {
  float best = -__builtin_inff();
  NaNs seen;
  bool odd = false;
  for (int begin = 0; begin < n; begin += kChunk) {
    const int end = begin + kChunk < n ? begin + kChunk : n;
    Vec most = vset(-__builtin_inff());
    int i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec a = vload(x + i);
      most = vmax(a, most);
      seen.add(a);
    }
    float largest = vtop(most);
    for (; i < end; ++i) {
      largest = x[i] > largest ? x[i] : largest;
      odd |= x[i] != x[i];
    }
    tops[begin / kChunk] = largest;
    best = largest > best ? largest : best;
  }
  *nan = odd || seen.any();
  return best;
}

double mass(const float* x, int n, float peak, float rate) {
  double total = 0;
  const float factor = rate * 1.44269504088896341f;
  for (int begin = 0; begin < n; begin += kChunk) {
    const int end = begin + kChunk < n ? begin + kChunk : n;
    Vec added = vset(0.0f);
    int i = begin;
    for (; i + kLanes <= end; i += kLanes) added = added + vexp2_below((vload(x + i) - vset(peak)) * vset(factor));
    total += vsum(added);
    for (; i < end; ++i) total += exp2_below((x[i] - peak) * factor);
  }
  return total;
}

int collect(const float* x, int n, const float* tops, float limit, float lowest, float temperature, float top,
            Candidate* to) {
  int count = 0;
  for (int begin = 0; begin < n; begin += kChunk) {
    if (tops[begin / kChunk] < limit) continue;
    const int end = begin + kChunk < n ? begin + kChunk : n;
    for (int i = begin; i < end; i += kLanes) {
      const int lanes = end - i < kLanes ? end - i : kLanes;
      const Vec logit = lanes == kLanes ? vload(x + i) : vload(x + i, lanes);
      unsigned left = vreach(logit, limit) & ((1u << lanes) - 1);
      if (left == 0) continue;
      const Vec scaled = logit / vset(temperature);
      float y[kLanes], weight[kLanes];
      vstore(y, scaled);
      vstore(weight, vexp2_below((scaled - vset(top)) * vset(1.44269504f)));
      for (; left != 0; left &= left - 1) {
        const int j = __builtin_ctz(left);
        to[count] = {y[j], weight[j], i + j};
        count += !(y[j] <= lowest);
      }
    }
  }
  return count;
}

}  // namespace

CHILIAD_EXPORT(SampleOps, sample_ops) = {peak, mass, collect};

}  // namespace chiliad
