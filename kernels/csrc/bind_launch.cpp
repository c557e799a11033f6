// Python's view of launches: what the CUDA driver is given, and the emulation that tests it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind_request.hpp"
#include "copy_plan.hpp"
#include "emulate.hpp"
#include "launch_plan.hpp"
#include "layered_plan.hpp"
#include "layout.hpp"
#include "runs.hpp"
#include "workers.hpp"

namespace nb = nanobind;

namespace {

using lmcache::CopyLaunch;
using lmcache::CopyPlan;
using lmcache::LayeredPlan;
using lmcache::Layout;
using lmcache::Slots;
using lmcache::Watched;
using lmcache::Workers;

using Range = std::tuple<uint64_t, uint64_t>;

template <class Plan>
void make_plan(Plan* at, const Layout& src, const Layout& dst, const Layout& scales,
               const nb::object& src_slots, const nb::object& dst_slots, uint32_t tokens,
               uint32_t first_layer, uint32_t last_layer, uint32_t convert) {
  const Slots from = lmcache::slots_of(src_slots, "src_slots");
  const Slots to = lmcache::slots_of(dst_slots, "dst_slots");
  const auto request = lmcache::request_of(from, to, tokens, first_layer, last_layer, convert);
  nb::gil_scoped_release unlocked;
  new (at) Plan(src, dst, scales, request);
}

using PartTuple = std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>;

// Of each: bytes of a run, of a word, runs of an item, items.
std::vector<PartTuple> parts(const CopyPlan& plan) {
  std::vector<PartTuple> made;
  for (const lmcache::CopyParams& part : plan.parts())
    made.emplace_back(part.run, part.width, part.axis[lmcache::kAxes - 1].count.by, part.items());
  return made;
}

// All parts as launches: (kernel, the bytes of its one parameter, blocks).
template <class Plan>
nb::list launches(const Plan& plan, uint64_t host, uint64_t device, uint32_t most_blocks) {
  nb::list made;
  for (const auto& launch :
       lmcache::launches_of(plan.parts(), plan.convert(), host, device, most_blocks))
    made.append(nb::make_tuple(
        launch.kernel,
        nb::bytes(reinterpret_cast<const char*>(&launch.params), sizeof(launch.params)),
        launch.blocks));
  return made;
}

template <class Plan>
uint64_t table_bytes(const Plan& plan) {
  return lmcache::table_bytes(plan.parts(), plan.convert());
}

auto runs(const CopyPlan& plan) {
  if (plan.convert() != lmcache::Convert::kNone)
    throw std::invalid_argument("convert: a copy engine converts nothing");
  auto all = lmcache::runs_of(plan);
  return std::tuple(std::move(all.dst), std::move(all.src), std::move(all.bytes));
}

nb::tuple emulate(const std::string& kernel, const nb::bytes& params, uint32_t blocks,
                  const std::vector<Range>& reads, const std::vector<Range>& writes,
                  Workers& workers) {
  CopyLaunch launch;
  if (params.size() != sizeof(launch)) throw std::invalid_argument("params: not those of a launch");
  std::memcpy(static_cast<void*>(&launch), params.c_str(), sizeof(launch));
  std::vector<Watched::Area> areas;
  for (const auto& [start, bytes] : writes)
    areas.push_back({start, start + bytes, std::vector<uint8_t>(bytes)});
  for (const auto& [start, bytes] : reads) areas.push_back({start, start + bytes, {}});
  const Watched memory(std::move(areas));
  {
    nb::gil_scoped_release unlocked;
    lmcache::emulate(kernel, launch, blocks, memory, workers);
  }
  nb::list counts;
  for (size_t i = 0; i < writes.size(); ++i) {
    const auto& bytes = memory.areas()[i].writes;
    counts.append(nb::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
  return nb::make_tuple(counts, memory.strays());
}

// What plans of all kinds have in common.
template <class Plan>
nb::class_<Plan> bind_plan(nb::module_& m, const char* name) {
  using namespace nb::literals;
  return nb::class_<Plan>(m, name)
      .def("__init__", &make_plan<Plan>, "src"_a, "dst"_a, "scales"_a, "src_slots"_a, "dst_slots"_a,
           "tokens"_a, "first_layer"_a, "last_layer"_a, "convert"_a, nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
      .def_prop_ro("bytes", &Plan::bytes)
      .def_prop_ro("table_bytes", &table_bytes<Plan>)
      .def_prop_ro("run_count", &Plan::runs)
      .def("launches", &launches<Plan>, "host"_a, "device"_a, "most_blocks"_a);
}

}  // namespace

void bind_launch(nb::module_& m) {
  using namespace nb::literals;
  bind_plan<CopyPlan>(m, "Plan").def("parts", &parts).def("runs", &runs);
  bind_plan<LayeredPlan>(m, "LayeredPlan").def_prop_ro("layers", &LayeredPlan::layers);
  m.attr("THREADS") = lmcache::kThreads;
  m.def("kernels", &lmcache::kernel_names);
  m.def("emulate", &emulate, "kernel"_a, "params"_a, "blocks"_a, "reads"_a, "writes"_a,
        "workers"_a);
}
