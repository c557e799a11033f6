// Pages on their way between an engine's memory and a tier's records.
//
// A page lies in the engine's memory as one or more segments (K and V, or one a layer) and in a
// tier as one contiguous record. Both functions take a whole batch, touch no Python object, and are
// called without the GIL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "xxh3.hpp"

namespace lmcache {

struct Segment {
  uint8_t* address;
  size_t bytes;
};

struct Record {
  uint8_t* address;
  size_t bytes;
};

// The key seeds the checksum, so whole bytes that lie under another page's key do not verify.
inline uint64_t page_checksum(std::string_view key, const Record& record) {
  return xxh3_64(record.address, record.bytes, xxh3_64(key.data(), key.size()));
}

// The caller guarantees that the segments are as long as the record.
inline void gather(std::span<const Segment> page, const Record& record) {
  uint8_t* out = record.address;
  for (const Segment& segment : page) {
    std::memcpy(out, segment.address, segment.bytes);
    out += segment.bytes;
  }
}

// The caller guarantees that the segments are as long as the record.
inline void scatter(const Record& record, std::span<const Segment> page) {
  const uint8_t* in = record.address;
  for (const Segment& segment : page) {
    std::memcpy(segment.address, in, segment.bytes);
    in += segment.bytes;
  }
}

inline size_t bytes_of(std::span<const Segment> page) {
  size_t total = 0;
  for (const Segment& segment : page) total += segment.bytes;
  return total;
}

}  // namespace lmcache
