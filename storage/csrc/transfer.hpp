// What a caller asks of the device, and for how long.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <span>

#include "../../kernels/csrc/pages.hpp"

namespace lmcache {

inline constexpr uint64_t kBlock = 4096;  // slots begin at, and are as long as, a multiple of it

inline uint64_t whole_blocks(uint64_t bytes) { return (bytes + kBlock - 1) / kBlock * kBlock; }

enum class Direction { Read, Write };

// One page on its way between a slot of the file and an engine's memory.
struct Transfer {
  uint64_t offset;                // of the slot in the file; a multiple of kBlock
  uint64_t bytes;                 // of the page; its slot holds whole_blocks(bytes) at least
  std::span<const Segment> page;  // where its bytes lie, `bytes` in all
  uint64_t seed;                  // of its checksum
  int error = 0;                  // out: errno; ECANCELED when it was not begun in time
  uint64_t checksum = 0;          // out: XXH3-64 of the page's bytes; 0 after an error
};

// When to stop beginning new I/O. What is in flight is waited for even then: the device reads from
// or writes into the caller's memory, which must not be used for anything else before it is done.
struct Limits {
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
  const std::atomic<bool>* cancelled = nullptr;

  bool passed() const {
    if (cancelled && cancelled->load(std::memory_order_relaxed)) return true;
    return std::chrono::steady_clock::now() >= deadline;
  }
};

}  // namespace lmcache
