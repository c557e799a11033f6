// A launch on a CPU: each thread of each block, with the geometry and the bodies of the GPU's, and
// every access looked at. For tests.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "launch.hpp"
#include "workers.hpp"

namespace lmcache {

// Memory that counts how often each byte is written, and what goes beside it or is not aligned.
class Watched {
 public:
  struct Area {
    uint64_t start;
    uint64_t end;
    std::vector<uint8_t> writes;  // of each byte; of memory that is only read, none
  };

  explicit Watched(std::vector<Area> areas) : areas_(std::move(areas)) {}

  template <class Type>
  Type load(uint64_t at) const {
    Type value{};
    if (at % sizeof(Type) != 0 || find(at, sizeof(Type)) == nullptr)
      ++strays_;
    else
      std::memcpy(&value, reinterpret_cast<const void*>(at), sizeof(Type));
    return value;
  }

  template <class Type>
  void store(uint64_t at, Type value) const {
    Area* area = at % sizeof(Type) == 0 ? find(at, sizeof(Type)) : nullptr;
    if (area == nullptr || area->writes.empty()) {
      ++strays_;
      return;
    }
    for (uint64_t i = 0; i < sizeof(Type); ++i)
      std::atomic_ref(area->writes[at - area->start + i]).fetch_add(1, std::memory_order_relaxed);
    std::memcpy(reinterpret_cast<void*>(at), &value, sizeof(Type));
  }

  const std::vector<Area>& areas() const { return areas_; }
  uint64_t strays() const { return strays_; }

 private:
  Area* find(uint64_t at, uint64_t bytes) const {
    for (Area& area : areas_)
      if (area.start <= at && at + bytes <= area.end) return &area;
    return nullptr;
  }

  mutable std::vector<Area> areas_;
  mutable std::atomic<uint64_t> strays_ = 0;
};

struct Block {
  uint32_t number;
  uint32_t blocks;
};

inline Place place_of(const CopyLaunch& launch, const Block& block, uint32_t thread) {
  return place_of(launch.lanes, block.number, thread, block.blocks);
}

template <unsigned kWidth>
void emulate_copy(const CopyLaunch& launch, const Block& block, const Watched& memory) {
  for (uint32_t thread = 0; thread < kThreads; ++thread)
    copy_thread<kWidth>(launch, place_of(launch, block, thread), memory);
}

template <class Half, unsigned kBy>
void emulate_dequantize(const CopyLaunch& launch, const Block& block, const Watched& memory) {
  for (uint32_t thread = 0; thread < kThreads; ++thread)
    dequantize_thread<Half, kBy>(launch, place_of(launch, block, thread), memory);
}

// What `__shfl_xor_sync` does, in as many steps.
inline void exchange(std::array<float, kWarp>& seen, uint32_t lanes) {
  for (uint32_t step = lanes / 2; step > 0; step /= 2) {
    const std::array<float, kWarp> before = seen;
    for (uint32_t lane = 0; lane < lanes; ++lane)
      seen[lane] = larger(before[lane], before[lane ^ step]);
  }
}

template <class Half, unsigned kBy>
void emulate_group_quantize(const CopyLaunch& launch, const Place& at, const Watched& memory) {
  const CopyParams& p = launch.copy;
  for (uint32_t number = at.group; number < p.items(); number += at.groups) {
    const Item item = find_item(p, number, kSides);
    for (uint32_t run = 0; run < p.axis[kAxes - 1].count.by; ++run) {
      const Converted where(p, item, run);
      std::array<float, kWarp> seen{};
      for (uint32_t lane = 0; lane < launch.lanes; ++lane)
        seen[lane] = look_at_run<Half, kBy>(launch, where, lane, memory);
      exchange(seen, launch.lanes);
      for (uint32_t lane = 0; lane < launch.lanes; ++lane)
        quantize_run<Half, kBy>(launch, where, seen[lane], lane, memory);
    }
  }
}

template <class Half, unsigned kBy>
void emulate_quantize(const CopyLaunch& launch, const Block& block, const Watched& memory) {
  for (uint32_t thread = 0; thread < kThreads; thread += launch.lanes)
    emulate_group_quantize<Half, kBy>(launch, place_of(launch, block, thread), memory);
}

using EmulateBlock = void (*)(const CopyLaunch&, const Block&, const Watched&);

inline const std::map<std::string, EmulateBlock>& emulated_kernels() {
#define LMCACHE_COPY(width) {"lmcache_copy_" #width, emulate_copy<width>},
#define LMCACHE_CONVERT(name, Half, by)                            \
  {"lmcache_quantize_" #name "_" #by, emulate_quantize<Half, by>}, \
      {"lmcache_dequantize_" #name "_" #by, emulate_dequantize<Half, by>},
  static const std::map<std::string, EmulateBlock> kernels{
      LMCACHE_COPY_KERNELS(LMCACHE_COPY) LMCACHE_CONVERT_KERNELS(LMCACHE_CONVERT)};
#undef LMCACHE_COPY
#undef LMCACHE_CONVERT
  return kernels;
}

// Blocks run beside each other, as those of a GPU do.
inline void emulate(const std::string& kernel, const CopyLaunch& launch, uint32_t blocks,
                    const Watched& memory, Workers& workers) {
  const auto found = emulated_kernels().find(kernel);
  if (found == emulated_kernels().end())
    throw std::invalid_argument("kernel: there is no " + kernel);
  workers.run(blocks, [&](size_t number) {
    found->second(launch, {static_cast<uint32_t>(number), blocks}, memory);
  });
}

}  // namespace lmcache
