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

// Bytes per second of reading `bytes` of memory front to back: the best rate over stretches of
// 32 MB, each with the prefetch distance that suits it, so that a busy machine does not lower it.
double read_bandwidth(Kernels& kernels, std::size_t bytes, int repeats) {
  constexpr std::size_t kStretch = std::size_t{32} << 20;
  const std::size_t stretches = std::max<std::size_t>(1, bytes / kStretch);
  const Bytes buffer = allocate(stretches * kStretch);
  std::memset(buffer.get(), 1, stretches * kStretch);  // untouched pages would all be one page
  std::lock_guard lock(kernels.busy);
  double best = 0;
  for (int i = 0; i < repeats; ++i)
    for (int ahead : {0, 16, 64})
      for (std::size_t at = 0; at < stretches; ++at) {
        const auto* data = reinterpret_cast<const float*>(buffer.get() + at * kStretch);
        const double time =
            seconds([&] { ceiling_ops(kernels.isa).read(kernels.threads, data, kStretch / 4, ahead); });
        best = std::max(best, kStretch / time);
      }
  return best;
}

// Flops per second of multiply-adds in registers.
double multiply_rate(Kernels& kernels, bool bfloat16, int repeats) {
  std::lock_guard lock(kernels.busy);
  double best = 0, flops = 0;
  for (int i = 0; i < repeats; ++i) {
    const double time = seconds([&] { flops = ceiling_ops(kernels.isa).multiply(kernels.threads, bfloat16, 20000); });
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
