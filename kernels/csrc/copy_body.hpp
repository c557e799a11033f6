// The body of every copy of pages: index arithmetic and word moves, for a CPU and a GPU alike.
//
// Threads come in groups of `lanes` that work on one item together, each on every `lanes`-th word,
// so that neighbours touch neighbouring words. A CPU is a group of one, and brings its own way to
// move a run (copy_cpu.hpp).
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

// One lane's share of an item: whole words of kWidth bytes, from any run of it.
template <unsigned kWidth>
LMCACHE_HD void copy_item(const CopyParams& p, uint32_t number, uint32_t lane, uint32_t lanes) {
  using Type = typename Word<kWidth>::Type;
  const Item item = find_item(p, number, 2);
  const Axis& inner = p.axis[kAxes - 1];
  const uint32_t words = inner.count.by * p.words.by;
  for (uint32_t i = lane; i < words; i += lanes) {
    const uint32_t run = p.words.divide(i);
    const uint64_t within = uint64_t{i - run * p.words.by} * kWidth;
    const auto* from =
        reinterpret_cast<const Type*>(item.at[kSrc] + offset(p, inner, kSrc, run) + within);
    auto* to = reinterpret_cast<Type*>(item.at[kDst] + offset(p, inner, kDst, run) + within);
    *to = *from;
  }
}

}  // namespace lmcache
