// read_bandwidth and multiply_rate for Python.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "bind.h"
#include "ceilings.h"

namespace nb = nanobind;

namespace chiliad {

CHILIAD_TABLES(CeilingOps, ceiling_ops)

namespace {

template <class F>
double seconds(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Bytes per second of reading a buffer of `bytes` once; the best of `repeats` with each prefetch distance.
double read_bandwidth(Kernels& kernels, std::size_t bytes, int repeats) {
  const Bytes buffer = allocate(bytes);
  std::memset(buffer.get(), 1, bytes);
  std::lock_guard lock(kernels.busy);
  double best = 0;
  for (int i = 0; i < repeats; ++i)
    for (int ahead : {0, 16, 64}) {
      const double time = seconds([&] {
        ceiling_ops(kernels.isa).read(kernels.threads, reinterpret_cast<const float*>(buffer.get()), bytes / 4, ahead);
      });
      best = std::max(best, static_cast<double>(bytes / (1 << 18) * (1 << 18)) / time);
    }
  return best;
}

// Flops per second of multiply-adds in registers.
double multiply_rate(Kernels& kernels, bool bfloat16, int repeats) {
  std::lock_guard lock(kernels.busy);
  double best = 0, flops = 0;
  for (int i = 0; i < repeats; ++i) {
    const double time = seconds([&] { flops = ceiling_ops(kernels.isa).multiply(kernels.threads, bfloat16, 100000); });
    best = std::max(best, flops / time);
  }
  return best;
}

}  // namespace

void register_ceilings(nb::module_& m) {
  m.def("read_bandwidth", &read_bandwidth, nb::call_guard<nb::gil_scoped_release>());
  m.def("multiply_rate", &multiply_rate, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace chiliad
