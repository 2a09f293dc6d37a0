// A decoder's layers in one call: what base.py calls `layers`.
#pragma once

#include <memory>
#include <vector>

#include "attention.h"
#include "linear.h"

namespace chiliad {

// See LayerSpec in base.py. Norms that a family does without have kind none.
struct Layer {
  Norm input_norm, q_norm, k_norm, post_attention_norm, mlp_norm, post_mlp_norm;
  std::shared_ptr<PackedLinear> qkv, out, up, down;
  Rope rope;
  int num_heads, window;
  float scale;
  Activation activation;
};

// Whether the layers' sizes fit each other; throws KernelError.
void check_layers(const std::vector<Layer>& layers);

// x [T, hidden] of the step's tokens becomes what leaves the last layer; K and V are written.
void run_layers(Kernels& kernels, const std::vector<Layer>& layers, const Step& step, float* x);

}  // namespace chiliad
