// The body of every copy of pages: where the runs of an item are, for a CPU and a GPU alike, and
// how a GPU's threads move them by words.
//
// Threads come in groups of `lanes` that work on one item together, each on every `lanes`-th word,
// so that neighbours touch neighbouring words. A CPU has its own way to move a run (copy_cpu.hpp).
#pragma once

#include "copy_params.hpp"

namespace lmcache {

// Where the runs of one item begin: those of the innermost axis's index 0, but for its own offset.
struct Item {
  uint64_t at[kSides];
};

LMCACHE_HD uint64_t offset(const CopyParams& p, const Axis& axis, unsigned side, uint32_t i) {
  return axis.is_row ? p.row[side][i] : static_cast<uint64_t>(axis.stride[side]) * i;
}

LMCACHE_HD Item find_item(const CopyParams& p, uint32_t number, unsigned sides) {
  const uint32_t rest = p.axis[1].count.divide(number);
  const uint32_t second = number - rest * p.axis[1].count.by;
  const uint32_t span = p.axis[0].count.divide(rest);
  const uint32_t first = rest - span * p.axis[0].count.by;
  Item item;
  for (unsigned side = 0; side < sides; ++side)
    item.at[side] =
        p.span[side][span] + offset(p, p.axis[0], side, first) + offset(p, p.axis[1], side, second);
  return item;
}

// How a body reaches memory. A GPU brings its own (copy_kernels.cu), and so does a test that counts
// (emulate.hpp). Addresses are multiples of the word's size.
struct Direct {
  template <class Type>
  LMCACHE_HD Type load(uint64_t at) const {
    return *reinterpret_cast<const Type*>(at);
  }
  template <class Type>
  LMCACHE_HD void store(uint64_t at, Type value) const {
    *reinterpret_cast<Type*>(at) = value;
  }
};

// Words that a lane loads before it stores the first of them: host memory answers late, and what
// is under way hides that.
inline constexpr uint32_t kWordsAhead = 4;

LMCACHE_HD uint32_t words_of_item(const CopyParams& p) {
  return p.axis[kAxes - 1].count.by * p.words.by;
}

// One lane's share of an item: whole words of kWidth bytes, from any run of it. An item has at
// most 2^31 words, so that `i` does not wrap around.
template <unsigned kWidth, class Memory>
LMCACHE_HD void copy_item(const CopyParams& p, uint32_t number, uint32_t lane, uint32_t lanes,
                          const Memory& memory) {
  using Type = typename Word<kWidth>::Type;
  const Item item = find_item(p, number, 2);
  const Axis& inner = p.axis[kAxes - 1];
  const uint32_t words = words_of_item(p);
  for (uint32_t first = lane; first < words; first += kWordsAhead * lanes) {
    Type held[kWordsAhead];
    uint64_t to[kWordsAhead];
    LMCACHE_UNROLL
    for (uint32_t j = 0; j < kWordsAhead; ++j) {
      const uint32_t i = first + j * lanes;
      if (i >= words) break;
      const uint32_t run = p.words.divide(i);
      const uint64_t within = uint64_t{i - run * p.words.by} * kWidth;
      to[j] = item.at[kDst] + offset(p, inner, kDst, run) + within;
      held[j] = memory.template load<Type>(item.at[kSrc] + offset(p, inner, kSrc, run) + within);
    }
    LMCACHE_UNROLL
    for (uint32_t j = 0; j < kWordsAhead; ++j)
      if (first + j * lanes < words) memory.store(to[j], held[j]);
  }
}

}  // namespace lmcache
