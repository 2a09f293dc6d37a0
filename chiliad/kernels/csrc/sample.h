// Choosing a token per row: the rule is ReferenceKernels.sample in reference.py.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace chiliad {

struct Candidate {
  float y;  // logit / temperature
  float weight;  // exp(y - largest y)
  std::int32_t id;
};

constexpr int kChunk = 128;  // tokens whose largest logit is kept, to skip chunks without candidates

struct SampleOps {
  // Largest of x[0, n), and of each chunk into tops. *nan: x holds a NaN.
  float (*peak)(const float* x, int n, float* tops, bool* nan);
  // sum of exp((x - peak) * rate)
  double (*mass)(const float* x, int n, float peak, float rate);
  // Every x >= limit whose y = x / temperature is not <= lowest, by rising id; returns how many.
  // top: the largest y.
  int (*collect)(const float* x, int n, const float* tops, float limit, float lowest, float temperature, float top,
                 Candidate* to);
};

struct Ids {
  const std::int32_t* at = nullptr;
  std::int64_t count = 0;
};

// One row's parameters; see SampleBatch in base.py.
struct SampleRow {
  float temperature, top_p, min_p, presence, frequency, repetition;
  int top_k, logprobs;
  double uniform;
  Ids prompt, output, bias_ids, banned;
  const float* bias = nullptr;
};

// logits [R, vocab] are changed while a row is worked on and restored before this returns. tokens
// (-1: none can be chosen) and logprob: [R]; top_ids and top_logprobs: [R, top_width], the first row.logprobs entries set.
void sample(Kernels& kernels, float* logits, int vocab, const std::vector<SampleRow>& rows, std::int32_t* tokens,
            float* logprob, std::int32_t* top_ids, float* top_logprobs, int top_width);

}  // namespace chiliad
