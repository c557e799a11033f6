// Python's view of the native data plane: one call a batch, the GIL released while bytes move.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "pages.hpp"

namespace nb = nanobind;

namespace {

using lmcache::Record;
using lmcache::Segment;

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

std::vector<uint64_t> gather_pages(const nb::list& key_objects, const nb::list& record_objects,
                                   const std::vector<uint64_t>& addresses,
                                   const std::vector<uint64_t>& sizes, size_t per_page) {
  const auto keys = keys_of(key_objects);
  const Segments pages(addresses, sizes, per_page);
  const Records records(record_objects, PyBUF_WRITABLE);
  require_same_length(keys.size(), records.size(), pages.pages());
  for (size_t i = 0; i < records.size(); ++i)
    if (lmcache::bytes_of(pages[i]) != records[i].bytes)
      throw nb::value_error("a record's length differs from its page's");
  std::vector<uint64_t> checksums(records.size());
  nb::gil_scoped_release unlocked;
  for (size_t i = 0; i < records.size(); ++i) {
    lmcache::gather(pages[i], records[i]);
    checksums[i] = lmcache::page_checksum(keys[i], records[i]);
  }
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
    whole[i] = lmcache::bytes_of(pages[i]) == records[i].bytes &&
               lmcache::page_checksum(keys[i], records[i]) == checksums[i];
    if (whole[i]) lmcache::scatter(records[i], pages[i]);
  }
  return whole;
}

std::vector<uint64_t> checksum_pages(const nb::list& key_objects, const nb::list& record_objects) {
  const auto keys = keys_of(key_objects);
  const Records records(record_objects, PyBUF_SIMPLE);
  require_same_length(keys.size(), records.size(), keys.size());
  std::vector<uint64_t> checksums(records.size());
  nb::gil_scoped_release unlocked;
  for (size_t i = 0; i < records.size(); ++i)
    checksums[i] = lmcache::page_checksum(keys[i], records[i]);
  return checksums;
}

uint64_t xxh3_of(const nb::bytes& data, uint64_t seed) {
  return lmcache::xxh3_64(data.c_str(), data.size(), seed);
}

uint64_t address_of(nb::handle object, bool writable) {
  Py_buffer view;
  if (PyObject_GetBuffer(object.ptr(), &view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
    throw nb::python_error();
  const auto address = reinterpret_cast<uint64_t>(view.buf);
  PyBuffer_Release(&view);
  return address;
}

}  // namespace

NB_MODULE(_native, m) {
  using namespace nb::literals;
  m.def("gather_pages", &gather_pages, "keys"_a, "records"_a, "addresses"_a, "sizes"_a,
        "per_page"_a);
  m.def("scatter_pages", &scatter_pages, "keys"_a, "records"_a, "checksums"_a, "addresses"_a,
        "sizes"_a, "per_page"_a);
  m.def("checksum_pages", &checksum_pages, "keys"_a, "records"_a);
  m.def("xxh3_64", &xxh3_of, "data"_a, "seed"_a = 0);
  m.def("address_of", &address_of, "buffer"_a, "writable"_a);
}
