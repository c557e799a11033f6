// The 64 bits by which nodes name a page to one another.
#pragma once

#include <cstdint>
#include <cstring>

#include "key.hpp"

namespace lmcache {

// Both halves of a key count, so that equal pages of two namespaces have two tags.
inline uint64_t page_tag(const char* key) {
  uint64_t space, hash;
  std::memcpy(&space, key, sizeof space);
  std::memcpy(&hash, key + kNamespaceBytes, sizeof hash);
  return space ^ hash;
}

}  // namespace lmcache
