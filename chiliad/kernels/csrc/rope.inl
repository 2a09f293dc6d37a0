// Per-head norms, rotation, and the write of k and v into their page, one page's rows at a time.
#include "attention.h"
#include "lanes.h"

namespace chiliad {
namespace {

inline void normalise(float* x, int size, const Norm& norm) {
  Vec added = vset(0.0f);
  float rest = 0, mean = 0;
  int d = 0;
  if (norm.kind == NormKind::layer) {
    for (; d + kLanes <= size; d += kLanes) added = added + vload(x + d);
    for (; d < size; ++d) rest += x[d];
    mean = (vsum(added) + rest) / static_cast<float>(size);
  }
  added = vset(0.0f), rest = 0;
  for (d = 0; d + kLanes <= size; d += kLanes) {
    const Vec y = vload(x + d) - vset(mean);
    added = vfma(y, y, added);
  }
  for (; d < size; ++d) rest = __builtin_fmaf(x[d] - mean, x[d] - mean, rest);
  const float scale = 1.0f / __builtin_sqrtf((vsum(added) + rest) / static_cast<float>(size) + norm.eps);
  for (d = 0; d < size; ++d) {
    const float y = (x[d] - mean) * scale * norm.weight[d];
    x[d] = norm.bias != nullptr ? y + norm.bias[d] : y;
  }
}

inline void rotate(float* x, const float* cos, const float* sin, int half) {
  float *first = x, *second = x + half;
  int d = 0;
  for (; d + kLanes <= half; d += kLanes) {
    const Vec a = vload(first + d), b = vload(second + d), c = vload(cos + d), s = vload(sin + d);
    const Vec bs = b * s, as = a * s;
    vstore(first + d, vfma(a, c, vset(0.0f) - bs));
    vstore(second + d, vfma(b, c, as));
  }
  for (; d < half; ++d) {
    const float a = first[d], b = second[d], bs = b * sin[d], as = a * sin[d];
    first[d] = __builtin_fmaf(a, cos[d], -bs);
    second[d] = __builtin_fmaf(b, cos[d], as);
  }
}

// One token's k and v of one head into its page; offset: the token's place in the block.
inline void write(const RopeCall& call, std::uint8_t* page, int head, int offset, const float* k, const float* v) {
  const std::int64_t size = std::int64_t{call.block_tokens} * call.head_dim;
  const std::int64_t k_at = head * size, v_at = (call.num_kv_heads + std::int64_t{head}) * size;
  if (call.bfloat16) {
    std::uint32_t* to = reinterpret_cast<std::uint32_t*>(page) + k_at / 2 + offset;
    for (int d = 0; d < call.head_dim; d += 2)
      to[std::int64_t{d} / 2 * call.block_tokens] = to_bf16(k[d]) | std::uint32_t{to_bf16(k[d + 1])} << 16;
    std::uint16_t* values = reinterpret_cast<std::uint16_t*>(page) + v_at + std::int64_t{offset / 2} * call.head_dim * 2 + offset % 2;
    for (int d = 0; d < call.head_dim; ++d) values[2 * d] = to_bf16(v[d]);
  } else {
    float* to = reinterpret_cast<float*>(page) + k_at + offset;
    for (int d = 0; d < call.head_dim; ++d) to[std::int64_t{d} * call.block_tokens] = k[d];
    __builtin_memcpy(reinterpret_cast<float*>(page) + v_at + std::int64_t{offset} * call.head_dim, v,
                     sizeof(float) * call.head_dim);
  }
}

void item(const RopeCall& call, const RopeItem& item) {
  const int head_dim = call.head_dim, heads = call.num_heads, kv_heads = call.num_kv_heads;
  std::uint8_t* page = call.arena + item.page * call.page_bytes;
  const int offset = item.position % call.block_tokens, rows = item.end - item.begin;
  if (offset == 0 && rows < call.block_tokens)  // a new page: no bits of its last owner may be read
    __builtin_memset(page, 0, std::int64_t{2} * kv_heads * head_dim * call.block_tokens * (call.bfloat16 ? 2 : 4));
  for (int r = 0; r < rows; ++r) {
    float* x = call.qkv + (std::int64_t{item.begin} + r) * (heads + 2 * kv_heads) * head_dim;
    const std::int64_t at = (std::int64_t{item.position} + r) * call.half;
    for (int head = 0; head < heads + kv_heads; ++head) {
      float* y = x + head * head_dim;
      const Norm& norm = head < heads ? call.q_norm : call.k_norm;
      if (norm.kind != NormKind::none) normalise(y, head_dim, norm);
      if (call.cos != nullptr) rotate(y, call.cos + at, call.sin + at, call.half);
    }
    const float *k = x + heads * head_dim, *v = k + kv_heads * head_dim;
    for (int head = 0; head < kv_heads; ++head)
      write(call, page, head, offset + r, k + head * head_dim, v + head * head_dim);
  }
}

}  // namespace

CHILIAD_EXPORT(RopeOps, rope_ops) = {item};

}  // namespace chiliad
