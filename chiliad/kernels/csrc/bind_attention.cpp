// attention, rope_kv, embed and sample, for cpu.py.
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "attention.h"
#include "bind.h"
#include "sample.h"

namespace nb = nanobind;

namespace chiliad {
namespace {

using Int32s = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void embed(Kernels& kernels, std::uintptr_t table, std::int64_t vocab, int hidden, bool bfloat16, std::uintptr_t ids,
           std::int64_t count, float scale, std::uintptr_t out) {
  const nb::gil_scoped_release released;
  const std::lock_guard held(kernels.busy);
  const std::int64_t* id = pointer<const std::int64_t>(ids);
  for (std::int64_t i = 0; i < count; ++i)
    if (id[i] < 0 || id[i] >= vocab)
      throw KernelError("token id " + std::to_string(id[i]) + " is outside the vocabulary of " + std::to_string(vocab));
  float* to = pointer<float>(out);
  constexpr std::int64_t kRows = 16;
  const int items = static_cast<int>((count + kRows - 1) / kRows);
  kernels.threads.share(0, items);
  kernels.threads.run([&](int worker) {
    for (int item; (item = kernels.threads.next(0, worker)) >= 0;)
      for (std::int64_t i = item * kRows; i < std::min(count, (item + 1) * kRows); ++i) {
        float* row = to + i * hidden;
        if (bfloat16) {
          const std::uint16_t* from = pointer<const std::uint16_t>(table) + id[i] * hidden;
          for (int d = 0; d < hidden; ++d) {
            const std::uint32_t bits = std::uint32_t{from[d]} << 16;
            float x;
            std::memcpy(&x, &bits, sizeof(x));
            row[d] = x * scale;
          }
        } else {
          const float* from = pointer<const float>(table) + id[i] * hidden;
          for (int d = 0; d < hidden; ++d) row[d] = from[d] * scale;
        }
      }
  });
}

void bind_rope_kv(Kernels& kernels, const Step& step, int layer, std::uintptr_t qkv, int num_heads, std::uintptr_t cos,
                  std::uintptr_t sin, int half, std::int64_t max_position, int q_kind, std::uintptr_t q_weight,
                  std::uintptr_t q_bias, float q_eps, int k_kind, std::uintptr_t k_weight, std::uintptr_t k_bias,
                  float k_eps) {
  const nb::gil_scoped_release released;
  const std::lock_guard held(kernels.busy);
  check_step(kernels, step, layer, layer + 1, num_heads);
  rope_kv(kernels, step, layer, pointer<float>(qkv), num_heads,
          {pointer<const float>(cos), pointer<const float>(sin), half, max_position},
          {NormKind(q_kind), pointer<const float>(q_weight), pointer<const float>(q_bias), q_eps},
          {NormKind(k_kind), pointer<const float>(k_weight), pointer<const float>(k_bias), k_eps});
}

void bind_attention(Kernels& kernels, const Step& step, int layer, std::uintptr_t qkv, int num_heads, float scale,
                    int window, std::uintptr_t out) {
  const nb::gil_scoped_release released;
  const std::lock_guard held(kernels.busy);
  check_step(kernels, step, layer, layer + 1, num_heads);
  attention(kernels, step, layer, pointer<const float>(qkv), num_heads, scale, window, pointer<float>(out));
}

// No conversion: floats among ids would be cut to integers.
template <class Array>
Array array_of(nb::handle value, const char* what) {
  Array array;
  if (!nb::try_cast(value, array, false)) throw KernelError(std::string("a sample batch has ") + what);
  return array;
}

constexpr const char* kIds = "ids in contiguous int32 arrays";

// Ragged inputs: a list with an int32 array, or None, per row.
std::vector<Ids> ragged(nb::sequence rows, std::size_t count, std::vector<Int32s>& kept) {
  std::vector<Ids> ids;
  for (nb::handle row : rows) {
    if (row.is_none()) {
      ids.emplace_back();
      continue;
    }
    kept.push_back(array_of<Int32s>(row, kIds));
    ids.push_back({kept.back().data(), static_cast<std::int64_t>(kept.back().shape(0))});
  }
  if (ids.size() != count) throw KernelError("a sample batch needs one entry per row in every field");
  return ids;
}

void bind_sample(Kernels& kernels, std::uintptr_t logits, int count, int vocab, Floats temperature, Floats top_p,
                 Int32s top_k, Floats min_p, Floats presence, Floats frequency, Floats repetition, Doubles uniform,
                 nb::sequence prompt, nb::sequence output, nb::sequence bias, nb::sequence banned, Int32s logprobs,
                 std::uintptr_t tokens, std::uintptr_t logprob, std::uintptr_t top_ids, std::uintptr_t top_logprobs,
                 int top_width) {
  const std::size_t rows_wanted = static_cast<std::size_t>(count);
  for (std::size_t size : {temperature.shape(0), top_p.shape(0), top_k.shape(0), min_p.shape(0), presence.shape(0),
                           frequency.shape(0), repetition.shape(0), uniform.shape(0), logprobs.shape(0)})
    if (size != rows_wanted) throw KernelError("a sample batch needs one entry per row in every field");
  std::vector<Int32s> kept;
  std::vector<Floats> kept_bias;
  const std::vector<Ids> prompts = ragged(prompt, rows_wanted, kept), outputs = ragged(output, rows_wanted, kept),
                         bans = ragged(banned, rows_wanted, kept);
  std::vector<SampleRow> rows(rows_wanted);
  std::size_t i = 0;
  for (nb::handle item : bias) {
    if (i == rows_wanted) throw KernelError("a sample batch needs one entry per row in every field");
    SampleRow& row = rows[i++];
    if (item.is_none()) continue;
    const nb::tuple pair = nb::cast<nb::tuple>(item);
    kept.push_back(array_of<Int32s>(pair[0], kIds));
    kept_bias.push_back(array_of<Floats>(pair[1], "a bias in contiguous float32 arrays"));
    if (kept.back().shape(0) != kept_bias.back().shape(0)) throw KernelError("a bias needs as many values as ids");
    row.bias_ids = {kept.back().data(), static_cast<std::int64_t>(kept.back().shape(0))};
    row.bias = kept_bias.back().data();
  }
  if (i != rows_wanted) throw KernelError("a sample batch needs one entry per row in every field");
  for (i = 0; i < rows_wanted; ++i) {
    SampleRow& row = rows[i];
    row.temperature = temperature(i), row.top_p = top_p(i), row.min_p = min_p(i), row.presence = presence(i);
    row.frequency = frequency(i), row.repetition = repetition(i), row.uniform = uniform(i);
    row.top_k = top_k(i), row.logprobs = logprobs(i);
    row.prompt = prompts[i], row.output = outputs[i], row.banned = bans[i];
    if (row.logprobs > top_width) throw KernelError("logprobs ask for more tokens than top_width");
  }
  const nb::gil_scoped_release released;
  const std::lock_guard held(kernels.busy);
  sample(kernels, pointer<float>(logits), vocab, rows, pointer<std::int32_t>(tokens), pointer<float>(logprob),
         pointer<std::int32_t>(top_ids), pointer<float>(top_logprobs), top_width);
}

}  // namespace

void register_attention(nb::module_& m) {
  m.def("embed", &embed);
  m.def("rope_kv", &bind_rope_kv);
  m.def("attention", &bind_attention);
  m.def("sample", &bind_sample);
}

}  // namespace chiliad
