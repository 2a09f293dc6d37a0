// What this machine can do at best: the ceilings that benchmarks stand beside.
#include "ceilings.h"
#include "simd.h"

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

// Multiply-adds from registers only. Returns the number of flops of all threads.
double multiply(ThreadPool& threads, [[maybe_unused]] bool bfloat16, int rounds) {
  double per_round = 0;
  threads.run([&](int worker) {
#if defined(__AMX_BF16__)
    if (bfloat16) {
      struct alignas(64) Config {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      };
      const Config config;
      __asm__ volatile("" : : "r"(&config) : "memory");
      _tile_loadconfig(&config);
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
      for (int i = 0; i < rounds; ++i) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_release();
      if (worker == 0) per_round = 4.0 * 2 * 16 * 16 * 32;
      return;
    }
#elif defined(__AVX512BF16__)
    if (bfloat16) {
      __m512 sum[16];
      const __m512bh x = (__m512bh)_mm512_set1_epi32(rounds);
      for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
      for (int k = 0; k < rounds; ++k)
        for (int i = 0; i < 16; ++i) {
          sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
          __asm__ volatile("" : "+v"(sum[i]));
        }
      if (worker == 0) per_round = 16.0 * 2 * 32;
      return;
    }
#endif
    constexpr int kSums = kLanes == 16 ? 16 : 12;
    Vec sum[kSums];
    for (int i = 0; i < kSums; ++i) sum[i] = vset(static_cast<float>(i));
    const Vec x = vset(0.999f);
    for (int k = 0; k < rounds; ++k)
      for (int i = 0; i < kSums; ++i) {
        sum[i] = vfma(sum[i], x, x);
#if defined(__x86_64__)
        __asm__ volatile("" : "+v"(sum[i]));
#else
        __asm__ volatile("" : "+w"(sum[i]));
#endif
      }
    if (worker == 0) per_round = kSums * 2.0 * kLanes;
  });
  return per_round * rounds * threads.size();
}

}  // namespace

CHILIAD_EXPORT(CeilingOps, ceiling_ops) = {read_all, multiply};

}  // namespace chiliad
