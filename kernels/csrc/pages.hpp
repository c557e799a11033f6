// Pages on their way between an engine's memory and a tier's records.
//
// A page lies in the engine's memory as one or more segments (K and V, or one a layer) and in a
// tier as one contiguous record. Its checksum is that of its bytes in the order of the segments,
// seeded by its key. Nothing here touches a Python object; it is called without the GIL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "copy.hpp"
#include "xxh3.hpp"

namespace lmcache {

struct Segment {
  uint8_t* address;
  size_t bytes;
};

inline size_t bytes_of(std::span<const Segment> page) {
  size_t total = 0;
  for (const Segment& segment : page) total += segment.bytes;
  return total;
}

// The key seeds the checksum, so whole bytes that lie under another page's key do not verify.
inline uint64_t page_seed(std::string_view key) { return xxh3_64(key.data(), key.size()); }

inline uint64_t checksum(std::span<const uint8_t> record, uint64_t seed) {
  return xxh3_64(record.data(), record.size(), seed);
}

inline uint64_t checksum(std::span<const Segment> page, uint64_t seed) {
  Xxh3 hash(seed);
  for (const Segment& segment : page) hash.update(segment.address, segment.bytes);
  return hash.digest();
}

// Copies a page into its record, which is as long; returns the checksum of what the record holds.
inline uint64_t gather(std::span<const Segment> page, uint8_t* record, uint64_t seed) {
  HashingCopy out(seed, bytes_of(page));
  for (const Segment& segment : page) {
    out.copy(record, segment.address, segment.bytes);
    record += segment.bytes;
  }
  return out.finish();
}

// Copies a record into its page, which is as long; returns the checksum of what the page holds.
inline uint64_t scatter(const uint8_t* record, std::span<const Segment> page, uint64_t seed) {
  HashingCopy out(seed, bytes_of(page));
  for (const Segment& segment : page) {
    out.copy(segment.address, record, segment.bytes);
    record += segment.bytes;
  }
  return out.finish();
}

// Copies a record into its page, which is as long.
inline void place(const uint8_t* record, std::span<const Segment> page) {
  for (const Segment& segment : page) {
    std::memcpy(segment.address, record, segment.bytes);
    record += segment.bytes;
  }
}

}  // namespace lmcache
