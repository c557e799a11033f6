// Arguments that calls about a batch of pages have in common.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string_view>
#include <vector>

#include "cancel.hpp"
#include "key.hpp"
#include "transfer.hpp"

namespace lmcache {

namespace nb = nanobind;

inline std::chrono::steady_clock::time_point deadline_in(double seconds) {
  using Clock = std::chrono::steady_clock;
  const double most = 365.0 * 24 * 3600;
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(
                            std::chrono::duration<double>(std::clamp(seconds, 0.0, most)));
}

// For calls whose arguments and answer are plain numbers and text.
using Unlocked = nb::call_guard<nb::gil_scoped_release>;
inline constexpr Unlocked kUnlocked;

// The bytes of a key, as long as the object lives.
inline std::string_view key_text(nb::handle object) {
  if (!PyBytes_Check(object.ptr())) throw nb::type_error("keys must be bytes");
  if (PyBytes_GET_SIZE(object.ptr()) != kKeyBytes) throw nb::value_error("a key has 48 bytes");
  return {PyBytes_AS_STRING(object.ptr()), kKeyBytes};
}

inline Key key_of(nb::handle object) { return Key::of(key_text(object)); }

inline std::vector<Key> keys_of(const nb::list& objects) {
  std::vector<Key> keys;
  keys.reserve(objects.size());
  for (nb::handle object : objects) keys.push_back(key_of(object));
  return keys;
}

// The memory of a batch, as the native side wants it.
struct Pages {
  Pages(const std::vector<uint64_t>& addresses, const std::vector<uint64_t>& sizes,
        size_t per_page) {
    if (per_page == 0 || addresses.size() != sizes.size() || addresses.size() % per_page != 0)
      throw nb::value_error("addresses and sizes must both hold per_page entries for each page");
    segments.reserve(addresses.size());
    for (size_t i = 0; i < addresses.size(); ++i)
      segments.push_back({reinterpret_cast<uint8_t*>(addresses[i]), static_cast<size_t>(sizes[i])});
    for (size_t i = 0; i < segments.size(); i += per_page) {
      pages.emplace_back(segments.data() + i, per_page);
      bytes.push_back(bytes_of(pages.back()));
    }
  }
  void require(size_t keys) const {
    if (keys != pages.size()) throw nb::value_error("keys and pages must be equally many");
  }
  std::vector<Segment> segments;
  std::vector<std::span<const Segment>> pages;
  std::vector<uint64_t> bytes;
};

inline Limits limits_of(double seconds, const Cancel* cancel) {
  return {deadline_in(seconds), cancel == nullptr ? nullptr : &cancel->raised};
}

template <class T>
nb::bytes codes_of(const std::vector<T>& outcome) {
  static_assert(sizeof(T) == 1);
  return nb::bytes(outcome.data(), outcome.size());
}

}  // namespace lmcache
