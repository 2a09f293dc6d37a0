// pack_linear, project and norm for Python. Addresses come from tensors that cpu.py has checked.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "linear.h"

namespace nb = nanobind;

namespace chiliad {
namespace {

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Norm norm_of(int kind, std::uintptr_t weight, std::uintptr_t bias, float eps) {
  return {static_cast<NormKind>(kind), at<const float>(weight), at<const float>(bias), eps};
}

}  // namespace

void register_linear(nb::module_& m) {
  nb::class_<PackedLinear>(m, "PackedLinear").def_prop_ro("nbytes", &PackedLinear::nbytes);
  m.def(
      "pack_linear",
      [](Kernels& kernels, std::uintptr_t weight, int from, std::uintptr_t scale, std::uintptr_t minimum,
         std::uintptr_t bias, int dtype, int in_features, std::vector<int> sizes, std::vector<int> slots) {
        const Weights weights{at<const void>(weight), static_cast<DType>(from), at<const std::uint16_t>(scale),
                              at<const std::uint16_t>(minimum)};
        return pack_linear(kernels, weights, at<const float>(bias), static_cast<DType>(dtype), in_features,
                           std::move(sizes), std::move(slots));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "project",
      [](Kernels& kernels, PackedLinear& linear, const Step* step, std::uintptr_t x, int rows,
         int norm_kind, std::uintptr_t norm_weight, std::uintptr_t norm_bias, float eps, int activation,
         std::uintptr_t y, bool add) {
        project(kernels, linear, step, at<const float>(x), rows, norm_of(norm_kind, norm_weight, norm_bias, eps),
                static_cast<Activation>(activation), at<float>(y), add);
      },
      nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
      nb::arg(), nb::arg(), nb::arg(), nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "norm",
      [](Kernels& kernels, std::uintptr_t x, int rows, int features, int norm_kind, std::uintptr_t norm_weight,
         std::uintptr_t norm_bias, float eps, std::uintptr_t y, bool add) {
        norm(kernels, at<const float>(x), rows, features, norm_of(norm_kind, norm_weight, norm_bias, eps),
             at<float>(y), add);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace chiliad
