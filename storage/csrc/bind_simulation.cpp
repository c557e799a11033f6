// Simulated caches as Python sees them: one call a policy and size, the GIL released while it
// works.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <vector>

#include "simulation.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace lmcache;

// Copied: Python's bytes need not lie where a number may.
template <typename Number>
std::vector<Number> numbers_in(const nb::bytes& packed) {
  if (packed.size() % sizeof(Number) != 0) throw nb::value_error("no whole numbers");
  std::vector<Number> numbers(packed.size() / sizeof(Number));
  if (!numbers.empty()) std::memcpy(numbers.data(), packed.c_str(), packed.size());
  return numbers;
}

nb::tuple simulated(const Trace& trace, uint32_t room, const std::string& policy) {
  Outcome outcome;
  {
    nb::gil_scoped_release unlocked;
    outcome = simulate(trace, room, policy);
  }
  return nb::make_tuple(outcome.references, outcome.hits, outcome.written);
}

}  // namespace

void bind_simulation(nb::module_& m) {
  nb::class_<Trace>(m, "SimulatedTrace")
      .def(
          "__init__",
          [](Trace* trace, const nb::bytes& pages, const nb::bytes& ends) {
            new (trace) Trace(numbers_in<uint32_t>(pages), numbers_in<uint64_t>(ends));
          },
          "pages"_a, "ends"_a)
      .def_ro("pages", &Trace::count);
  m.def("simulate", &simulated, "trace"_a, "room"_a, "policy"_a);
  m.def("simulated_policies", &simulated_policies);
}
