// Python's view of copies between layouts: one call a batch, the GIL released while bytes move.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "copy_cpu.hpp"
#include "copy_plan.hpp"
#include "layout.hpp"
#include "workers.hpp"

namespace nb = nanobind;

namespace {

using lmcache::Convert;
using lmcache::CopyPlan;
using lmcache::CopyRequest;
using lmcache::Layout;
using lmcache::Workers;

using PlaneTuple = std::tuple<std::vector<uint64_t>, uint64_t, uint64_t, uint64_t, uint64_t>;
using Range = std::tuple<uint64_t, uint64_t>;
using Slots = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Layout* make_layout(Layout* at, const std::vector<PlaneTuple>& planes,
                    std::vector<uint64_t> pages_at, uint64_t pages, uint32_t page_size,
                    uint32_t heads, uint32_t itemsize, const std::vector<Range>& memory) {
  Layout layout;
  for (const auto& [layers, page_stride, token_stride, head_stride, run] : planes)
    layout.planes.push_back({layers, page_stride, token_stride, head_stride, run});
  layout.pages_at = std::move(pages_at);
  layout.pages = pages;
  layout.page_size = page_size;
  layout.heads = heads;
  layout.itemsize = itemsize;
  for (const auto& [start, bytes] : memory) layout.memory.push_back({start, start + bytes});
  layout.require_sound();
  return new (at) Layout(std::move(layout));
}

Slots slots_of(const nb::object& given, const char* name) {
  Slots slots;
  if (!nb::try_cast<Slots>(given, slots, false))
    throw lmcache::LayoutError(std::string(name) + ": not int64 [n], contiguous, in host memory");
  return slots;
}

CopyRequest request_of(const Slots& src_slots, const Slots& dst_slots, uint32_t tokens,
                       uint32_t first_layer, uint32_t last_layer, uint32_t convert) {
  CopyRequest request;
  request.slots[lmcache::kSrc] = {src_slots.data(), src_slots.size()};
  request.slots[lmcache::kDst] = {dst_slots.data(), dst_slots.size()};
  request.tokens = tokens;
  request.layers[0] = first_layer;
  request.layers[1] = last_layer;
  request.convert = static_cast<Convert>(convert);
  return request;
}

uint64_t copy(const Layout& src, const Layout& dst, const Layout& scales,
              const nb::object& src_slots, const nb::object& dst_slots, uint32_t tokens,
              uint32_t first_layer, uint32_t last_layer, uint32_t convert, Workers& workers) {
  const Slots from = slots_of(src_slots, "src_slots"), to = slots_of(dst_slots, "dst_slots");
  const auto request = request_of(from, to, tokens, first_layer, last_layer, convert);
  nb::gil_scoped_release unlocked;
  const CopyPlan plan(src, dst, scales, request);
  lmcache::copy_on_cpu(plan, workers);
  return plan.bytes();
}

using PartTuple = std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>;

// Of each launch: bytes of a run, of a word, runs of an item, items.
std::vector<PartTuple> parts_of(const Layout& src, const Layout& dst, const Layout& scales,
                                const nb::object& src_slots, const nb::object& dst_slots,
                                uint32_t tokens, uint32_t first_layer, uint32_t last_layer,
                                uint32_t convert) {
  const Slots from = slots_of(src_slots, "src_slots"), to = slots_of(dst_slots, "dst_slots");
  const auto request = request_of(from, to, tokens, first_layer, last_layer, convert);
  const CopyPlan plan(src, dst, scales, request);
  std::vector<PartTuple> parts;
  for (const lmcache::CopyParams& part : plan.parts())
    parts.emplace_back(part.run, part.width, part.axis[lmcache::kAxes - 1].count.by, part.items());
  return parts;
}

}  // namespace

void bind_copy(nb::module_& m) {
  using namespace nb::literals;
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const lmcache::LayoutError& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const lmcache::SlotError& error) {
      PyErr_SetString(PyExc_IndexError, error.what());
    }
  });
  nb::class_<Layout>(m, "Layout")
      .def("__init__", &make_layout, "planes"_a, "pages_at"_a, "pages"_a, "page_size"_a, "heads"_a,
           "itemsize"_a, "memory"_a);
  m.def("copy", &copy, "src"_a, "dst"_a, "scales"_a, "src_slots"_a, "dst_slots"_a, "tokens"_a,
        "first_layer"_a, "last_layer"_a, "convert"_a, "workers"_a);
  m.def("parts_of", &parts_of, "src"_a, "dst"_a, "scales"_a, "src_slots"_a, "dst_slots"_a,
        "tokens"_a, "first_layer"_a, "last_layer"_a, "convert"_a);
}
