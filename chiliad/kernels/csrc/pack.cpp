// Packing: weights as they come -> panels (see "Packed weights" in linear.h).
#include <algorithm>
#include <cstring>
#include <numeric>

#include "linear.h"

namespace chiliad {

namespace {

std::uint16_t round_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Plain weights as float32.
struct Source {
  const void* data;
  DType dtype;
  int in_features;
  float operator()(int row, int k) const {
    const std::size_t i = static_cast<std::size_t>(row) * in_features + k;
    if (dtype == DType::float32) return static_cast<const float*>(data)[i];
    const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(data)[i]} << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
  }
};

// Column n of block `half` of a panel, from the levels of one row.
void pack_levels(const Weights& weights, DType dtype, int in_features, int row, int half, int n, std::byte* panel) {
  const auto* level = static_cast<const std::uint8_t*>(weights.data) + static_cast<std::size_t>(row) * in_features;
  const int groups = (in_features + 31) / 32, tile = dtype == DType::int4 ? 256 : 512;
  for (int g = 0; g < groups; ++g, panel += group_bytes(dtype), level += 32) {
    const int count = std::min(32, in_features - 32 * g);
    std::byte* to = panel + half * tile;
    if (dtype == DType::int8) {
      for (int k = 0; k < count; ++k)
        to[k / 4 * 64 + n / 4 * 16 + k / 2 % 2 * 8 + n % 4 * 2 + k % 2] = static_cast<std::byte>(level[k]);
    } else {
      for (int k = 0; k < count; ++k)
        to[k / 8 * 64 + n * 4 + k % 2 * 2 + k / 4 % 2] |= static_cast<std::byte>((level[k] & 15) << (k / 2 % 2 * 4));
    }
    const std::size_t at = static_cast<std::size_t>(row) * groups + g;
    std::memcpy(panel + 2 * tile + half * 32 + n * 2, weights.scale + at, 2);
    if (dtype == DType::int4) std::memcpy(panel + 2 * tile + 64 + half * 32 + n * 2, weights.minimum + at, 2);
  }
}

void pack_block(PackedLinear& linear, const Weights& weights, int index, std::byte* panel) {
  const Source weight{weights.data, weights.dtype, linear.in_features};
  const Block& block = linear.blocks[index];
  const int half = index % 2;
  for (int n = 0; n < block.width; ++n) {
    const int row = block.out + n;
    if (linear.dtype == DType::float32) {
      float* to = reinterpret_cast<float*>(panel) + half * kBlock + n;
      for (int k = 0; k < linear.in_features; ++k) to[static_cast<std::size_t>(k) * kPanel] = weight(row, k);
    } else if (linear.dtype == DType::bfloat16) {
      auto* to = reinterpret_cast<std::uint16_t*>(panel) + half * 512 + n * 2;
      for (int k = 0; k < linear.in_features; ++k)
        to[k / 32 * 1024 + k % 32 / 2 * 32 + k % 2] = round_bf16(weight(row, k));
    } else {
      pack_levels(weights, linear.dtype, linear.in_features, row, half, n, panel);
    }
  }
}

void lay_out(PackedLinear& linear) {
  std::vector<int> first(linear.sizes.size(), 0);
  std::partial_sum(linear.sizes.begin(), linear.sizes.end() - 1, first.begin() + 1);
  const int count = static_cast<int>(linear.sizes.size());
  linear.paired = count == 2 && linear.sizes[0] == linear.sizes[1];
  auto add = [&](int p, int column) {
    linear.blocks.push_back({p, column, std::min(kBlock, linear.sizes[p] - column), first[p] + column});
  };
  if (linear.paired)
    for (int column = 0; column < linear.sizes[0]; column += kBlock) add(0, column), add(1, column);
  else
    for (int p = 0; p < count; ++p)
      for (int column = 0; column < linear.sizes[p]; column += kBlock) add(p, column);
  if (linear.blocks.size() % 2) linear.blocks.push_back({-1, 0, 0, 0});
  linear.num_panels = static_cast<int>(linear.blocks.size()) / 2;
}

}  // namespace

std::shared_ptr<PackedLinear> pack_linear(Kernels& kernels, const Weights& weights, const float* bias, DType dtype, int in_features,
                         std::vector<int> sizes, std::vector<int> slots) {
  const bool levels = weights.dtype == DType::int8 || weights.dtype == DType::int4;
  if (levels ? dtype != weights.dtype : dtype != DType::float32 && dtype != DType::bfloat16)
    throw KernelError("levels are packed as what they are, plain weights as float32 or bfloat16");
  if (levels && (!weights.scale || (dtype == DType::int4 && !weights.minimum)))
    throw KernelError("levels need their scales, and int4 its minima");
  if (in_features <= 0 || sizes.empty() || sizes.size() != slots.size() ||
      std::any_of(sizes.begin(), sizes.end(), [](int size) { return size <= 0; }))
    throw KernelError("a linear needs positive sizes and one slot per size");
  auto packed = std::make_shared<PackedLinear>();
  PackedLinear& linear = *packed;
  linear.dtype = dtype;
  linear.in_features = in_features;
  linear.out_features = std::accumulate(sizes.begin(), sizes.end(), 0);
  linear.k_padded = dtype == DType::float32 ? in_features : (in_features + 31) / 32 * 32;
  linear.sizes = std::move(sizes);
  linear.slots = std::move(slots);
  lay_out(linear);
  linear.panel_bytes = dtype == DType::float32 ? static_cast<std::size_t>(linear.k_padded) * kPanel * sizeof(float)
                                               : static_cast<std::size_t>(linear.k_padded) / 32 * group_bytes(dtype);
  if (bias != nullptr) {
    linear.bias.assign(linear.blocks.size() * kBlock, 0.0f);
    for (std::size_t i = 0; i < linear.blocks.size(); ++i)
      std::copy_n(bias + linear.blocks[i].out, linear.blocks[i].width, linear.bias.data() + i * kBlock);
  }
  std::lock_guard lock(kernels.busy);
  linear.weights = kernels.keep(linear.nbytes());
  kernels.threads.share(0, linear.num_panels);
  kernels.threads.run([&](int worker) {
    for (int panel; (panel = kernels.threads.next(0, worker)) >= 0;)
      for (int half = 0; half < 2; ++half)
        pack_block(linear, weights, 2 * panel + half, linear.weights.get() + panel * linear.panel_bytes);
  });
  return packed;
}

}  // namespace chiliad
