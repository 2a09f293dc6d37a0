#include "layers.h"

#include <algorithm>
#include <string>

namespace chiliad {

namespace {

bool gated(Activation activation) {
  return activation == Activation::silu_mul || activation == Activation::gelu_tanh_mul;
}

int inner(const Layer& layer) { return layer.up->out_features / (gated(layer.activation) ? 2 : 1); }

}  // namespace

void check_layers(const std::vector<Layer>& layers) {
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const int hidden = layers[0].qkv->in_features;
    if (layer.qkv->in_features != hidden || layer.out->out_features != hidden || layer.up->in_features != hidden ||
        layer.down->out_features != hidden || layer.down->in_features != inner(layer) ||
        layer.qkv->out_features <= layer.out->in_features || layer.num_heads != layers[0].num_heads ||
        (gated(layer.activation) && !layer.up->paired))
      throw KernelError("the weights of layer " + std::to_string(i) + " do not fit each other");
  }
}

void run_layers(Kernels& kernels, const std::vector<Layer>& layers, const Step& step, float* x) {
  std::lock_guard lock(kernels.busy);
  const Arena& arena = kernels.arena;
  const std::size_t rows = static_cast<std::size_t>(step.num_tokens);
  const int hidden = layers[0].qkv->in_features;
  int wide = hidden, narrow = hidden;  // floats of a row: qkv or what the MLP holds; what attention makes
  for (const Layer& layer : layers) {
    const int q = layer.num_heads * arena.head_dim, kv = arena.num_kv_heads * arena.head_dim;
    if (layer.out->in_features != q || layer.qkv->out_features != q + 2 * kv)
      throw KernelError("the weights of attention do not fit the arena's KV layout: bind the arena of this model");
    wide = std::max({wide, layer.qkv->out_features, inner(layer)});
    narrow = std::max(narrow, q);
  }
  check_step(kernels, step, 0, static_cast<int>(layers.size()), layers[0].num_heads);
  float* a = reinterpret_cast<float*>(kernels.scratch(kActivations, sizeof(float) * rows * static_cast<std::size_t>(wide + narrow)));
  float* b = a + rows * static_cast<std::size_t>(wide);
  const int count = step.num_tokens;
  // x += post(linear(from)), or without a norm in between
  auto add = [&](PackedLinear& linear, const float* from, const Tiles& tiles, const Norm& post, float* room) {
    if (post.kind == NormKind::none) return project(kernels, linear, &step, from, count, {}, Activation::none, x, true, tiles);
    project(kernels, linear, &step, from, count, {}, Activation::none, room, false, tiles);
    norm(kernels, room, count, linear.out_features, post, x, true);
  };
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const int number = static_cast<int>(i);
    project(kernels, *layer.qkv, &step, x, count, layer.input_norm, Activation::none, a, false);
    rope_kv(kernels, step, number, a, layer.num_heads, layer.rope, layer.q_norm, layer.k_norm);
    Tiles tiles = arena.head_dim % 32 == 0 ? room_for_inputs(kernels, *layer.out, &step, count) : Tiles{};
    attention(kernels, step, number, a, layer.num_heads, layer.scale, layer.window, b, tiles);
    const std::size_t next = (i + 1) % layers.size();  // of the next step, which may well be of the same rows
    fetch_kv(kernels, step, static_cast<int>(next), layers[next].window);
    add(*layer.out, b, tiles, layer.post_attention_norm, a);
    tiles = room_for_inputs(kernels, *layer.down, &step, count);
    project(kernels, *layer.up, &step, x, count, layer.mlp_norm, layer.activation, a, false, {}, tiles);
    add(*layer.down, a, tiles, layer.post_mlp_norm, b);
  }
}

}  // namespace chiliad
