// pack_layers and layers for Python. Addresses come from tensors that cpu.py has checked and keeps.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bind.h"
#include "layers.h"

namespace nb = nanobind;

namespace chiliad {
namespace {

using NormTuple = std::tuple<int, std::uintptr_t, std::uintptr_t, float>;  // kind, weight, bias, eps
using RopeTuple = std::tuple<std::uintptr_t, std::uintptr_t, int, std::int64_t>;
// norms: input, q, k, post attention, MLP, post MLP; linears: qkv, out, up, down; rope; heads, window, scale, activation
using LayerTuple = std::tuple<std::vector<NormTuple>, std::vector<std::shared_ptr<PackedLinear>>, RopeTuple, int, int,
                              float, int>;

struct Layers {
  std::vector<Layer> layers;
};

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Norm norm_of(const NormTuple& norm) {
  const auto& [kind, weight, bias, eps] = norm;
  return {static_cast<NormKind>(kind), pointer<const float>(weight), pointer<const float>(bias), eps};
}

Layers pack_layers(const std::vector<LayerTuple>& tuples) {
  Layers packed;
  for (const auto& [norms, linears, rope, heads, window, scale, activation] : tuples) {
    const auto& [cos, sin, half, positions] = rope;
    packed.layers.push_back({norm_of(norms.at(0)), norm_of(norms.at(1)), norm_of(norms.at(2)), norm_of(norms.at(3)),
                             norm_of(norms.at(4)), norm_of(norms.at(5)), linears.at(0), linears.at(1), linears.at(2),
                             linears.at(3), {pointer<const float>(cos), pointer<const float>(sin), half, positions},
                             heads, window, scale, static_cast<Activation>(activation)});
  }
  check_layers(packed.layers);
  return packed;
}

}  // namespace

void register_layers(nb::module_& m) {
  nb::class_<Layers>(m, "Layers");
  m.def("pack_layers", &pack_layers);
  m.def(
      "layers",
      [](Kernels& kernels, const Layers& layers, const Step& step, std::uintptr_t x) {
        run_layers(kernels, layers.layers, step, pointer<float>(x));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace chiliad
