// Python's view of the native data plane: one call a batch, the GIL released while bytes move.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "pages.hpp"
#include "simd.hpp"
#include "workers.hpp"

namespace nb = nanobind;

namespace {

using lmcache::Segment;
using lmcache::Simd;
using lmcache::Workers;

using Record = std::span<uint8_t>;

// The buffers of a batch of records, held for as long as native code works on them.
class Records {
 public:
  Records(const nb::list& objects, int flags) {
    views_.reserve(objects.size());
    for (nb::handle object : objects) {
      Py_buffer view;
      if (PyObject_GetBuffer(object.ptr(), &view, flags) != 0) {
        release();
        throw nb::python_error();
      }
      views_.push_back(view);
    }
  }
  ~Records() { release(); }
  Records(const Records&) = delete;
  Records& operator=(const Records&) = delete;

  size_t size() const { return views_.size(); }
  Record operator[](size_t i) const {
    return {static_cast<uint8_t*>(views_[i].buf), static_cast<size_t>(views_[i].len)};
  }

 private:
  void release() {
    for (Py_buffer& view : views_) PyBuffer_Release(&view);
    views_.clear();
  }
  std::vector<Py_buffer> views_;
};

std::vector<std::string_view> keys_of(const nb::list& objects) {
  std::vector<std::string_view> keys;
  keys.reserve(objects.size());
  for (nb::handle object : objects) {
    if (!PyBytes_Check(object.ptr())) throw nb::type_error("keys must be bytes");
    keys.emplace_back(PyBytes_AS_STRING(object.ptr()), PyBytes_GET_SIZE(object.ptr()));
  }
  return keys;
}

class Segments {
 public:
  Segments(const std::vector<uint64_t>& addresses, const std::vector<uint64_t>& sizes,
           size_t per_page)
      : per_page_(per_page) {
    if (per_page == 0 || addresses.size() != sizes.size() || addresses.size() % per_page != 0)
      throw nb::value_error("addresses and sizes must both hold per_page entries for each page");
    all_.reserve(addresses.size());
    for (size_t i = 0; i < addresses.size(); ++i)
      all_.push_back({reinterpret_cast<uint8_t*>(addresses[i]), static_cast<size_t>(sizes[i])});
  }
  size_t pages() const { return all_.size() / per_page_; }
  std::span<const Segment> operator[](size_t page) const {
    return {all_.data() + page * per_page_, per_page_};
  }

 private:
  std::vector<Segment> all_;
  size_t per_page_;
};

void require_same_length(size_t keys, size_t records, size_t pages) {
  if (keys != pages || records != pages)
    throw nb::value_error("keys, records and pages must be equally many");
}

void require_as_long(const Segments& pages, const Records& records) {
  for (size_t i = 0; i < records.size(); ++i)
    if (lmcache::bytes_of(pages[i]) != records[i].size())
      throw nb::value_error("a record's length differs from its page's");
}

std::vector<uint64_t> gather_pages(const nb::list& key_objects, const nb::list& record_objects,
                                   const std::vector<uint64_t>& addresses,
                                   const std::vector<uint64_t>& sizes, size_t per_page) {
  const auto keys = keys_of(key_objects);
  const Segments pages(addresses, sizes, per_page);
  const Records records(record_objects, PyBUF_WRITABLE);
  require_same_length(keys.size(), records.size(), pages.pages());
  require_as_long(pages, records);
  std::vector<uint64_t> checksums(records.size());
  nb::gil_scoped_release unlocked;
  for (size_t i = 0; i < records.size(); ++i)
    checksums[i] = lmcache::gather(pages[i], records[i].data(), lmcache::page_seed(keys[i]));
  return checksums;
}

std::vector<bool> scatter_pages(const nb::list& key_objects, const nb::list& record_objects,
                                const std::vector<uint64_t>& checksums,
                                const std::vector<uint64_t>& addresses,
                                const std::vector<uint64_t>& sizes, size_t per_page) {
  const auto keys = keys_of(key_objects);
  const Segments pages(addresses, sizes, per_page);
  const Records records(record_objects, PyBUF_SIMPLE);
  require_same_length(keys.size(), records.size(), pages.pages());
  if (checksums.size() != keys.size()) throw nb::value_error("one checksum for each key");
  std::vector<bool> whole(records.size());
  nb::gil_scoped_release unlocked;
  for (size_t i = 0; i < records.size(); ++i) {
    const uint64_t seed = lmcache::page_seed(keys[i]);
    whole[i] = lmcache::bytes_of(pages[i]) == records[i].size() &&
               lmcache::checksum(records[i], seed) == checksums[i];
    if (whole[i]) lmcache::scatter(records[i].data(), pages[i], seed);
  }
  return whole;
}

void place_pages(const nb::list& record_objects, const std::vector<uint64_t>& addresses,
                 const std::vector<uint64_t>& sizes, size_t per_page) {
  const Segments pages(addresses, sizes, per_page);
  const Records records(record_objects, PyBUF_SIMPLE);
  require_same_length(pages.pages(), records.size(), pages.pages());
  require_as_long(pages, records);
  nb::gil_scoped_release unlocked;
  for (size_t i = 0; i < records.size(); ++i) lmcache::place(records[i].data(), pages[i]);
}

std::vector<uint64_t> checksum_pages(const nb::list& key_objects, const nb::list& record_objects) {
  const auto keys = keys_of(key_objects);
  const Records records(record_objects, PyBUF_SIMPLE);
  require_same_length(keys.size(), records.size(), keys.size());
  std::vector<uint64_t> checksums(records.size());
  nb::gil_scoped_release unlocked;
  for (size_t i = 0; i < records.size(); ++i)
    checksums[i] = lmcache::checksum(records[i], lmcache::page_seed(keys[i]));
  return checksums;
}

uint64_t address_of(nb::handle object, bool writable) {
  Py_buffer view;
  if (PyObject_GetBuffer(object.ptr(), &view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
    throw nb::python_error();
  const auto address = reinterpret_cast<uint64_t>(view.buf);
  PyBuffer_Release(&view);
  return address;
}

// The rest is called by tests alone.

uint64_t scatter_page(const nb::bytes& key, nb::handle record,
                      const std::vector<uint64_t>& addresses, const std::vector<uint64_t>& sizes) {
  nb::list only;
  only.append(record);
  const Records records(only, PyBUF_SIMPLE);
  const Segments pages(addresses, sizes, addresses.size());
  if (lmcache::bytes_of(pages[0]) != records[0].size())
    throw nb::value_error("the record's length differs from its page's");
  const uint64_t seed = lmcache::page_seed({key.c_str(), key.size()});
  nb::gil_scoped_release unlocked;
  return lmcache::scatter(records[0].data(), pages[0], seed);
}

uint64_t checksum_page(const nb::bytes& key, const std::vector<uint64_t>& addresses,
                       const std::vector<uint64_t>& sizes) {
  const Segments pages(addresses, sizes, addresses.size());
  return lmcache::checksum(pages[0], lmcache::page_seed({key.c_str(), key.size()}));
}

uint64_t xxh3_of_parts(const nb::list& parts, uint64_t seed) {
  const Records records(parts, PyBUF_SIMPLE);
  lmcache::Xxh3 hash(seed);
  for (size_t i = 0; i < records.size(); ++i) hash.update(records[i].data(), records[i].size());
  return hash.digest();
}

uint64_t xxh3_of(const nb::bytes& data, uint64_t seed) {
  return lmcache::xxh3_64(data.c_str(), data.size(), seed);
}

constexpr std::array<std::pair<std::string_view, Simd>, 3> kSimdUnits = {
    {{"baseline", Simd::kBaseline}, {"avx2", Simd::kAvx2}, {"avx512", Simd::kAvx512}}};

nb::list simd_units() {
  nb::list names;
  for (const auto& [name, unit] : kSimdUnits)
    if (lmcache::supports(unit)) names.append(nb::str(name.data(), name.size()));
  return names;
}

void use_simd(std::string_view wanted) {
  for (const auto& [name, unit] : kSimdUnits)
    if (name == wanted && lmcache::supports(unit)) return lmcache::simd().store(unit);
  throw nb::value_error("no such vector unit here");
}

void run_workers(Workers& workers, size_t count, const nb::callable& job) {
  const Workers::Job call = [&job](size_t i) {
    const nb::gil_scoped_acquire locked;
    job(i);
  };
  nb::gil_scoped_release unlocked;
  workers.run(count, call);
}

}  // namespace

void bind_copy(nb::module_& m);    // bind_copy.cpp
void bind_launch(nb::module_& m);  // bind_launch.cpp

NB_MODULE(_native, m) {
  using namespace nb::literals;
  m.def("gather_pages", &gather_pages, "keys"_a, "records"_a, "addresses"_a, "sizes"_a,
        "per_page"_a);
  m.def("scatter_pages", &scatter_pages, "keys"_a, "records"_a, "checksums"_a, "addresses"_a,
        "sizes"_a, "per_page"_a);
  m.def("place_pages", &place_pages, "records"_a, "addresses"_a, "sizes"_a, "per_page"_a);
  m.def("checksum_pages", &checksum_pages, "keys"_a, "records"_a);
  m.def("address_of", &address_of, "buffer"_a, "writable"_a);

  m.def("scatter_page", &scatter_page, "key"_a, "record"_a, "addresses"_a, "sizes"_a);
  m.def("checksum_page", &checksum_page, "key"_a, "addresses"_a, "sizes"_a);
  m.def("xxh3_64", &xxh3_of, "data"_a, "seed"_a = 0);
  m.def("xxh3_64_of_parts", &xxh3_of_parts, "parts"_a, "seed"_a = 0);
  m.def("simd_units", &simd_units);
  m.def("use_simd", &use_simd, "unit"_a);
  nb::class_<Workers>(m, "Workers")
      .def(nb::init<unsigned>(), "threads"_a)
      .def("run", &run_workers, "count"_a, "job"_a);
  bind_copy(m);
  bind_launch(m);
}
