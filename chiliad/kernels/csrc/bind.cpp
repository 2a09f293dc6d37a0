// The Python face of the core. cpu.py checks tensors and passes raw addresses; what crosses
// here is plain numbers and handles, so that a call costs about a microsecond. Errors are
// thrown (KernelError, std::bad_alloc, ...), never aborts.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "bind.h"
#include "write_rows.h"

namespace nb = nanobind;
using namespace chiliad;

namespace {

using Int32s = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Int64s = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& message) { throw KernelError(message); }

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "int8") return DType::int8;
  if (name == "int4") return DType::int4;
  refuse("dtype " + name + " is not supported");
}

void bind_arena(Kernels& kernels, std::uintptr_t data, std::int64_t bytes, int num_layers, int num_kv_heads,
                int head_dim, int block_tokens, const std::string& dtype, std::int64_t page_bytes) {
  if (data % 64) refuse("the arena must be 64-byte aligned");
  const DType kv = dtype_of(dtype);
  if (kv != DType::float32 && kv != DType::bfloat16) refuse("KV dtype must be float32 or bfloat16");
  if (kv == DType::bfloat16 && head_dim % 2) refuse("a bfloat16 KV cache needs an even head_dim: use float32");
  if (block_tokens <= 0 || block_tokens % 16) refuse("block_tokens must be a multiple of 16");
  if (page_bytes % 64 || page_bytes < std::int64_t{2} * num_kv_heads * head_dim * block_tokens * item_bytes(kv))
    refuse("page_bytes must be a multiple of 64 that holds K and V of one block");
  kernels.bind({reinterpret_cast<std::uint8_t*>(data), bytes, num_layers, num_kv_heads, head_dim, block_tokens, kv,
                page_bytes});
}

void adapter_init(Adapter* self, const std::string& dtype) {
  const DType rows = dtype_of(dtype);
  if (rows == DType::int4) refuse("adapter rows must be float32, bfloat16 or int8");
  (new (self) Adapter())->dtype = rows;
}

// All slots at once, in rising order; the arrays hold one slot's rows after the other's.
void low_ranks(Adapter& adapter, const std::vector<int>& slots, const std::vector<int>& ranks, Int64s a, Int64s b,
               Floats scale) {
  std::int64_t rows = 0;
  for (int rank : ranks) rows += rank;
  if (slots.size() != ranks.size() || static_cast<std::int64_t>(a.shape(0)) != rows ||
      static_cast<std::int64_t>(b.shape(0)) != rows || static_cast<std::int64_t>(scale.shape(0)) != rows)
    refuse("low_ranks needs a rank for every slot, and as many a as b as scale");
  adapter.low_ranks.clear();
  adapter.numbers.assign(2 * rows + (rows + 1) / 2 + slots.size(), 0);
  std::int64_t *at = adapter.numbers.data(), row = 0;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] < static_cast<int>(adapter.low_ranks.size())) refuse("low_ranks needs slots >= 0 in rising order");
    LowRank low{ranks[i], -1, -1, at, at + ranks[i], reinterpret_cast<const float*>(at + 2 * ranks[i])};
    for (int j = 0; j < low.rank; ++j) {
      if (a(row + j) < 0 || b(row + j) < 0 || a(row + j) % 64 || b(row + j) % 64)
        refuse("rank rows must be 64-byte aligned offsets into the arena");
      low.last_a = std::max(low.last_a, a(row + j));
      low.last_b = std::max(low.last_b, b(row + j));
    }
    std::copy_n(a.data() + row, low.rank, at);
    std::copy_n(b.data() + row, low.rank, at + low.rank);
    std::memcpy(at + 2 * low.rank, scale.data() + row, sizeof(float) * low.rank);
    at += 2 * low.rank + (low.rank + 1) / 2;
    row += low.rank;
    adapter.low_ranks.resize(slots[i]);
    adapter.low_ranks.push_back(low);
  }
}

void elementwise(Adapter& adapter, int slot, std::int64_t d, std::int64_t g, std::int64_t c) {
  for (std::int64_t offset : {d, g, c})
    if (slot < 0 || offset < -1 || (offset >= 0 && offset % 64))
      refuse("elementwise vectors must be 64-byte aligned offsets into the arena");
  if (static_cast<int>(adapter.elementwise_at.size()) <= slot) adapter.elementwise_at.resize(slot + 1, -1);
  adapter.elementwise_at[slot] = static_cast<int>(adapter.elementwises.size());
  adapter.elementwises.push_back({d, g, c});
}

// (address, file type, rows, columns, row stride, column stride, factor)
using MatrixTuple = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float>;

void write_rows_from(Kernels& kernels, const std::vector<MatrixTuple>& tuples, Int64s offsets, const std::string& dtype,
                     std::uintptr_t scale) {
  const DType to = dtype_of(dtype);
  if (to == DType::int4) refuse("adapter rows must be float32, bfloat16 or int8");
  std::vector<Matrix> matrices;
  std::int64_t rows = 0;
  for (const auto& [data, type, count, columns, row_stride, column_stride, factor] : tuples) {
    matrices.push_back({reinterpret_cast<const void*>(data), static_cast<FileType>(type), count, columns, row_stride,
                        column_stride, factor});
    rows += count;
  }
  if (static_cast<std::int64_t>(offsets.shape(0)) != rows) refuse("write_rows needs an offset for every row");
  const std::int64_t* at = offsets.data();
  nb::gil_scoped_release release;
  write_rows(kernels, matrices, at, to, reinterpret_cast<float*>(scale));
}

void touch_arena(Kernels& kernels, std::int64_t begin, std::int64_t end) {
  if (begin < 0 || end < begin || end > kernels.arena.bytes) refuse("these bytes are not in the arena");
  touch(kernels.arena.data + begin, end - begin);
}

// A Step with the Python objects it points into.
struct StepHandle : Step {
  std::vector<nb::object> kept;
};

void step_init(StepHandle* self, int num_tokens, Int32s positions, Int32s row_start, Int32s context,
               nb::sequence page_tables, nb::sequence segments) {
  new (self) StepHandle();
  StepHandle& step = *self;
  step.num_tokens = num_tokens;
  step.num_sequences = static_cast<int>(context.shape(0));
  if (static_cast<int>(positions.shape(0)) != num_tokens || row_start.shape(0) != context.shape(0) + 1)
    refuse("a step needs num_tokens positions and one row_start more than sequences");
  step.positions = positions.data();
  step.row_start = row_start.data();
  step.context = context.data();
  if (row_start(0) != 0 || row_start(step.num_sequences) != num_tokens) refuse("row_start must run from 0 to num_tokens");
  for (nb::handle item : page_tables) {
    const Table table = nb::cast<Table>(item, false);  // no copy: only `item` is kept
    if (step.page_tables.empty()) step.num_layers = static_cast<int>(table.shape(1));
    if (static_cast<int>(table.shape(1)) != step.num_layers) refuse("page tables need one column per layer");
    step.page_tables.push_back(table.data());
    step.num_blocks.push_back(static_cast<int>(table.shape(0)));
    step.kept.push_back(nb::borrow(item));
  }
  if (static_cast<int>(step.page_tables.size()) != step.num_sequences) refuse("a step needs one page table per sequence");
  for (int i = 0; i < step.num_sequences; ++i)
    if (step.row_start[i] >= step.row_start[i + 1]) refuse("every sequence of a step needs at least one row");
  int row = 0;
  for (nb::handle item : segments) {
    const nb::tuple segment = nb::cast<nb::tuple>(item);
    const int start = nb::cast<int>(segment[0]), stop = nb::cast<int>(segment[1]);
    const Adapter* adapter = segment[2].is_none() ? nullptr : nb::cast<const Adapter*>(segment[2]);
    if (start != row || stop < start) refuse("segments must cover the rows of the step in order");
    row = stop;
    if (stop > start) step.segments.push_back({start, stop, adapter});
    if (adapter != nullptr) step.kept.push_back(nb::borrow(segment[2]));
  }
  if (row != num_tokens) refuse("segments must cover the rows of the step in order");
  step.kept.push_back(nb::find(positions));
  step.kept.push_back(nb::find(row_start));
  step.kept.push_back(nb::find(context));
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "C++ kernels of chiliad; use chiliad.kernels.cpu";
  // Kept for the life of the process, as the translator is.
  static PyObject* error = nb::object(nb::module_::import_("chiliad.errors").attr("KernelError")).release().ptr();
  nb::register_exception_translator(
      [](const std::exception_ptr& thrown, void*) {
        try {
          std::rethrow_exception(thrown);
        } catch (const KernelError& e) {
          PyErr_SetString(error, e.what());
        }
      });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.push_back(isa_name(isa));
    return names;
  });
  nb::class_<Kernels>(m, "Kernels")
      .def(nb::init<const std::string&, int>())
      .def_prop_ro("isa", [](const Kernels& kernels) { return std::string(isa_name(kernels.isa)); })
      .def_prop_ro("threads", [](const Kernels& kernels) { return kernels.threads.size(); })
      .def("bind_arena", &bind_arena)
      .def("write_rows", &write_rows_from)
      .def("touch_arena", &touch_arena, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Adapter>(m, "Adapter")
      .def("__init__", &adapter_init)
      .def("low_ranks", &low_ranks)
      .def("elementwise", &elementwise);
  nb::class_<Step>(m, "StepBase");
  nb::class_<StepHandle, Step>(m, "Step").def("__init__", &step_init, nb::arg("num_tokens"),
           nb::arg("positions").noconvert(), nb::arg("row_start").noconvert(), nb::arg("context").noconvert(),
           nb::arg("page_tables"), nb::arg("segments"));
  register_ceilings(m);
  register_linear(m);
  register_attention(m);
  register_layers(m);
}
