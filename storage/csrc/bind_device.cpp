// The device and the step hook as Python sees them, for tests.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cancel.hpp"
#include "device.hpp"
#include "steps.hpp"

namespace nb = nanobind;

namespace {

using lmcache::Cancel;
using lmcache::Device;
using lmcache::DeviceOptions;
using lmcache::Limits;
using lmcache::Segment;
using lmcache::Step;
using lmcache::Transfer;

using Addresses = std::vector<uint64_t>;
using Page =
    std::tuple<uint64_t, Addresses, Addresses, uint64_t>;  // offset, addresses, sizes, seed
using Outcome = std::pair<int, uint64_t>;                  // errno, checksum

class Transfers {
 public:
  explicit Transfers(const std::vector<Page>& pages) {
    segments_.reserve(pages.size());
    transfers_.reserve(pages.size());
    for (const auto& [offset, addresses, sizes, seed] : pages) {
      const auto& page = segments_.emplace_back(segments_of(addresses, sizes));
      if (offset % lmcache::kBlock != 0) throw nb::value_error("a slot begins at a block");
      transfers_.push_back({offset, lmcache::bytes_of(page), page, seed});
    }
  }

  std::span<Transfer> all() { return transfers_; }

  std::vector<Outcome> outcomes() const {
    std::vector<Outcome> outcomes;
    for (const Transfer& page : transfers_) outcomes.emplace_back(page.error, page.checksum);
    return outcomes;
  }

 private:
  static std::vector<Segment> segments_of(const Addresses& addresses, const Addresses& sizes) {
    if (addresses.size() != sizes.size()) throw nb::value_error("one size for each address");
    std::vector<Segment> page;
    for (size_t i = 0; i < sizes.size(); ++i)
      page.push_back({reinterpret_cast<uint8_t*>(addresses[i]), static_cast<size_t>(sizes[i])});
    return page;
  }

  std::vector<std::vector<Segment>> segments_;
  std::vector<Transfer> transfers_;
};

Limits limits_of(std::optional<double> seconds, const Cancel* cancel) {
  using Clock = std::chrono::steady_clock;
  Limits limits;
  if (seconds)
    limits.deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                         std::chrono::duration<double>(std::min(*seconds, 1e9)));
  if (cancel) limits.cancelled = &cancel->raised;
  return limits;
}

template <auto kMove>
std::vector<Outcome> move_pages(Device& device, const std::vector<Page>& pages,
                                std::optional<double> timeout, const Cancel* cancel) {
  Transfers transfers(pages);
  const Limits limits = limits_of(timeout, cancel);
  {
    nb::gil_scoped_release unlocked;
    (device.*kMove)(transfers.all(), limits);
  }
  return transfers.outcomes();
}

DeviceOptions::Engine engine_named(const std::string& name) {
  if (name == "auto") return DeviceOptions::Engine::Auto;
  if (name == "threads") return DeviceOptions::Engine::Threads;
  if (name == "io_uring") return DeviceOptions::Engine::Uring;
  throw nb::value_error("an engine is auto, threads or io_uring");
}

DeviceOptions::Path path_named(const std::string& name) {
  if (name == "auto") return DeviceOptions::Path::Auto;
  if (name == "straight") return DeviceOptions::Path::Straight;
  if (name == "buffers") return DeviceOptions::Path::Buffers;
  throw nb::value_error("a path is auto, straight or buffers");
}

void open_device(Device* self, const std::string& file, unsigned queue_depth,
                 const std::string& engine, bool direct, const std::string& path) {
  const DeviceOptions options{queue_depth, engine_named(engine), direct, path_named(path)};
  try {
    nb::gil_scoped_release unlocked;
    new (self) Device(file, options);
    return;
  } catch (const std::system_error& error) {
    errno = error.code().value();
  }
  PyErr_SetFromErrnoWithFilename(PyExc_OSError, file.c_str());
  nb::raise_python_error();
}

// The I/O threads hold the hook without the GIL, so its last holder takes it, unless Python is
// gone.
std::shared_ptr<nb::object> held_without_gil(nb::object object) {
  return {new nb::object(std::move(object)), [](nb::object* held) {
            if (!nb::is_alive()) return;
            nb::gil_scoped_acquire locked;
            delete held;
          }};
}

int call_hook(const nb::object& hook, Step kind, uint64_t offset, uint64_t bytes) {
  nb::gil_scoped_acquire locked;
  try {
    const nb::object answer = hook(lmcache::name_of(kind), offset, bytes);
    const long error = PyLong_AsLong(answer.ptr());
    if (error == -1 && PyErr_Occurred()) nb::raise_python_error();
    return static_cast<int>(error);
  } catch (nb::python_error& error) {
    error.discard_as_unraisable(hook);
    return EIO;
  }
}

void install_hook(const std::optional<nb::callable>& hook) {
  if (!hook) return lmcache::set_step_hook({});
  lmcache::set_step_hook(
      [held = held_without_gil(*hook)](Step kind, uint64_t offset, uint64_t bytes) {
        return call_hook(*held, kind, offset, bytes);
      });
}

}  // namespace

void bind_device(nb::module_& m) {
  using namespace nb::literals;
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<Device>(m, "Device")
      .def("__init__", &open_device, "file"_a, "queue_depth"_a = 8, "engine"_a = "auto",
           "direct"_a = true, "path"_a = "auto")
      .def("read", &move_pages<&Device::read>, "pages"_a, "timeout"_a = nb::none(),
           "cancel"_a = nb::none())
      .def("write", &move_pages<&Device::write>, "pages"_a, "timeout"_a = nb::none(),
           "cancel"_a = nb::none())
      .def("flush", &Device::flush, released)
      .def_prop_ro("direct", &Device::direct)
      .def_prop_ro("why_not_direct", &Device::why_not_direct)
      .def_prop_ro("through_buffers", &Device::through_buffers)
      .def_prop_ro("engine", &Device::engine)
      .def_prop_ro("bytes", &Device::bytes);
  m.def("set_step_hook", &install_hook, "hook"_a.none());
}
