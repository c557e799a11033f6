// Python's view of copies between layouts: one call a batch, the GIL released while bytes move.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_request.hpp"
#include "copy_cpu.hpp"
#include "copy_plan.hpp"
#include "layout.hpp"
#include "overlap.hpp"
#include "workers.hpp"

namespace nb = nanobind;

namespace {

using lmcache::CopyPlan;
using lmcache::Layout;
using lmcache::Slots;
using lmcache::Workers;

using PlaneTuple = std::tuple<std::vector<uint64_t>, uint64_t, uint64_t, uint64_t, uint64_t>;
using Range = std::tuple<uint64_t, uint64_t>;

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
  layout.overlaps = lmcache::runs_overlap(layout);
  return new (at) Layout(std::move(layout));
}

uint64_t copy(const Layout& src, const Layout& dst, const Layout& scales,
              const nb::object& src_slots, const nb::object& dst_slots, uint32_t tokens,
              uint32_t first_layer, uint32_t last_layer, uint32_t convert, Workers& workers) {
  const Slots from = lmcache::slots_of(src_slots, "src_slots");
  const Slots to = lmcache::slots_of(dst_slots, "dst_slots");
  auto request = lmcache::request_of(from, to, tokens, first_layer, last_layer, convert);
  nb::gil_scoped_release unlocked;
  const CopyPlan plan(src, dst, scales, std::move(request));
  lmcache::copy_on_cpu(plan, workers);
  return plan.bytes();
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
}
