// A copy on a GPU: how many blocks and threads, what each thread does, and by which kernel.
// Computed here alone, so that a test on a CPU (emulate.hpp) goes through the same threads as a
// launch does.
//
// Threads form groups of `lanes`; group g works on items g, g + groups, g + 2 groups, ...
#pragma once

#include "copy_body.hpp"
#include "fp8.hpp"

namespace lmcache {

// The one parameter of a kernel. Compilers of both sides must agree about its bytes.
struct CopyLaunch {
  CopyParams copy;
  uint32_t lanes = 1;  // of a group: a power of two
};
static_assert(sizeof(CopyParams) == 192 && sizeof(CopyLaunch) == 200 && alignof(CopyLaunch) == 8);

inline constexpr uint32_t kThreads = 256;  // of a block
inline constexpr uint32_t kWarp = 32;
inline constexpr uint32_t kAtOnce = 8;  // numbers that a conversion reads as one word of 16 bytes

// Where a thread stands among all of a launch.
struct Place {
  uint32_t group;
  uint32_t groups;
  uint32_t lane;
};

LMCACHE_HD Place place_of(uint32_t lanes, uint32_t block, uint32_t thread, uint32_t blocks) {
  const uint32_t number = block * kThreads + thread;
  return {number / lanes, blocks * kThreads / lanes, number % lanes};
}

template <unsigned kWidth, class Memory>
LMCACHE_HD void copy_thread(const CopyLaunch& launch, const Place& at, const Memory& memory) {
  const uint32_t items = launch.copy.items();
  for (uint32_t number = at.group; number < items; number += at.groups)
    copy_item<kWidth>(launch.copy, number, at.lane, launch.lanes, memory);
}

template <class Half, unsigned kBy, class Memory>
LMCACHE_HD void dequantize_thread(const CopyLaunch& launch, const Place& at, const Memory& memory) {
  const CopyParams& p = launch.copy;
  const uint32_t items = p.items(), runs = p.axis[kAxes - 1].count.by;
  for (uint32_t number = at.group; number < items; number += at.groups) {
    const Item item = find_item(p, number, kSides);
    for (uint32_t run = 0; run < runs; ++run) {
      const Converted where(p, item, run);
      const float scale = memory.template load<float>(reinterpret_cast<uint64_t>(where.scale));
      convert_run<Dequantize<Half>, kBy>(where.to, where.from, p.run, scale, at.lane, launch.lanes,
                                         memory);
    }
  }
}

// A run that is quantised takes two steps, for its scale comes from what all lanes of the group
// have seen. How they tell each other is left to who runs them: a warp exchanges registers.

template <class Half, unsigned kBy, class Memory>
LMCACHE_HD float look_at_run(const CopyLaunch& launch, const Converted& where, uint32_t lane,
                             const Memory& memory) {
  return Quantize<Half>::template largest<kBy>(where.from, launch.copy.run, lane, launch.lanes,
                                               memory);
}

LMCACHE_HD float larger(float a, float b) { return a < b ? b : a; }

template <class Half, unsigned kBy, class Memory>
LMCACHE_HD void quantize_run(const CopyLaunch& launch, const Converted& where, float largest,
                             uint32_t lane, const Memory& memory) {
  const float scale = Quantize<Half>::scale(largest);
  if (lane == 0) memory.store(reinterpret_cast<uint64_t>(where.scale), scale);
  convert_run<Quantize<Half>, kBy>(where.to, where.from, launch.copy.run, scale, lane, launch.lanes,
                                   memory);
}

// All kernels there are. `E` makes of each what its place needs: of a width in bytes, and of a
// name, a format and how many numbers are read at once.
#define LMCACHE_COPY_KERNELS(E) E(1) E(2) E(4) E(8) E(16)
#define LMCACHE_CONVERT_KERNELS(E) \
  E(bf16, Bf16, 1) E(bf16, Bf16, 8) E(fp16, Fp16, 1) E(fp16, Fp16, 8)

}  // namespace lmcache
