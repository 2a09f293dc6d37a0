// What this machine can do at best: the ceilings that benchmarks stand beside.
#include <atomic>

#include "ceilings.h"
#include "tiles.h"

namespace chiliad {
namespace {

// Read every byte once. Two strides of prefetch, whichever suits: the caller takes the best.
float read_all(ThreadPool& threads, const float* data, std::size_t count, int ahead) {
  constexpr int kItem = 1 << 16;  // floats per work item
  const int items = static_cast<int>(count / kItem);
  threads.share(0, items);
  float total = 0;
  threads.run([&](int worker) {
    Vec sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = vset(0.0f);
    for (int item; (item = threads.next(0, worker)) >= 0;) {
      const float* p = data + static_cast<std::size_t>(item) * kItem;
      for (int k = 0; k < kItem; k += 8 * kLanes)
        for (int i = 0; i < 8; ++i) {
          if (ahead && i % (16 / kLanes) == 0) __builtin_prefetch(p + k + i * kLanes + ahead * 16);
          sum[i] = sum[i] + vload(p + k + i * kLanes);
        }
    }
    for (int i = 1; i < 8; ++i) sum[0] = sum[0] + sum[i];
    const float mine = vsum(sum[0]);
    if (mine == 1.2345f) total = mine;  // keeps the loads
  });
  return total;
}

#if CHILIAD_AMX

double multiply_tiles(int rounds) {
  configure_tiles({});
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
  for (int i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 2 * 16 * 16 * 32 * rounds;
}

#endif

// Twelve independent chains of multiply-adds. Each round is opaque to the compiler.
template <class V, class Step>
void chains(V (&sum)[12], int rounds, const Step& step) {
  V a = sum[0], b = sum[1], c = sum[2], d = sum[3], e = sum[4], f = sum[5];
  V g = sum[6], h = sum[7], i = sum[8], j = sum[9], k = sum[10], l = sum[11];
  for (int round = 0; round < rounds; ++round) {
    step(a); step(b); step(c); step(d); step(e); step(f);
    step(g); step(h); step(i); step(j); step(k); step(l);
  }
  sum[0] = (a + b) + (c + d) + (e + f) + (g + h) + (i + j) + (k + l);
}

double multiply_vectors([[maybe_unused]] bool bfloat16, int rounds) {
  Vec sum[12];
  for (int i = 0; i < 12; ++i) sum[i] = vset(static_cast<float>(i));
  double flops = 12 * 2.0 * kLanes;
#if defined(__AVX512BF16__)
  if (bfloat16) {
    const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f7f3f7f);
    chains(sum, rounds, [&](__m512& s) { s = _mm512_dpbf16_ps(s, x, x); });
    flops *= 2;
  } else
#endif
  {
    const Vec x = vset(0.999f);
    chains(sum, rounds, [&](Vec& s) { s = vfma(s, x, x); });
  }
  volatile float keep = vsum(sum[0]);
  static_cast<void>(keep);
  return flops * rounds;
}

// Multiply-adds from registers only. Returns the number of flops of all threads.
double multiply(ThreadPool& threads, bool bfloat16, int rounds) {
  std::atomic<double> flops{0};
  threads.share(0, 16 * threads.size());
  threads.run([&](int worker) {
    while (threads.next(0, worker) >= 0) {
#if CHILIAD_AMX
      flops += bfloat16 ? multiply_tiles(rounds) : multiply_vectors(false, rounds);
#else
      flops += multiply_vectors(bfloat16, rounds);
#endif
    }
  });
  return flops;
}

}  // namespace

CHILIAD_EXPORT(CeilingOps, ceiling_ops) = {read_all, multiply};

}  // namespace chiliad
