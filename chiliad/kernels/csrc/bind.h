// What the bind_*.cpp files share: each gives one `register_...` that adds its ops to the module.
#pragma once

#include <nanobind/nanobind.h>

#include "kernels.h"

namespace chiliad {

// One line per bind_*.cpp; bind.cpp calls them.
void register_ceilings(nanobind::module_& m);
void register_linear(nanobind::module_& m);
void register_attention(nanobind::module_& m);
void register_layers(nanobind::module_& m);

}  // namespace chiliad
