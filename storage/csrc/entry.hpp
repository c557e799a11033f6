// What the index says of a page. docs/format.md draws it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>

#include "../../kernels/csrc/pages.hpp"
#include "key.hpp"

namespace lmcache {

struct Entry {
  uint64_t offset;      // of its slot in the region
  uint32_t length;      // bytes of the page
  uint32_t generation;  // of the slot when the page was written
  uint64_t checksum;    // XXH3-64 of the page, seeded with its key's
  uint64_t sequence;    // order of insertion
  Tag parent;           // of the page before it in its chain; 0: none known
  uint32_t flags;       // none yet
  uint32_t check;       // of this record under its key

  bool operator==(const Entry&) const = default;
};
static_assert(sizeof(Entry) == 48 && offsetof(Entry, check) == 44);

inline uint32_t check_of(const Key& key, const Entry& entry) {
  return static_cast<uint32_t>(xxh3_64(&entry, offsetof(Entry, check), page_seed(key.view())));
}

inline void seal(const Key& key, Entry& entry) { entry.check = check_of(key, entry); }

// Empty when the bytes are no whole entry of that key: flipped bits, or another key's entry.
inline std::optional<Entry> unseal(const Key& key, const void* data, size_t bytes) {
  Entry entry;
  if (bytes != sizeof entry) return std::nullopt;
  std::memcpy(&entry, data, sizeof entry);
  if (entry.check != check_of(key, entry)) return std::nullopt;
  return entry;
}

}  // namespace lmcache
