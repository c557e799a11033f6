// Python's view of the stores on this node.
#include <nanobind/nanobind.h>

#include "cancel.hpp"

namespace nb = nanobind;

void bind_device(nb::module_& m);
void bind_directory(nb::module_& m);
void bind_simulation(nb::module_& m);
void bind_slab(nb::module_& m);
void bind_wire(nb::module_& m);

NB_MODULE(_native, m) {
  using lmcache::Cancel;
  nb::set_leak_warnings(false);  // an engine may end without closing its store
  nb::class_<Cancel>(m, "Cancel")
      .def(nb::init<>())
      .def("set", [](Cancel& cancel) { cancel.raised = true; })
      .def("is_set", [](const Cancel& cancel) { return cancel.raised.load(); });
  bind_device(m);
  bind_directory(m);
  bind_simulation(m);
  bind_slab(m);
  bind_wire(m);
}
