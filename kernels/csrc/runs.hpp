// A plan's runs, one by one: what a copy engine is given instead of a kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "copy_body.hpp"
#include "copy_plan.hpp"

namespace lmcache {

struct Runs {
  std::vector<uint64_t> dst, src, bytes;

  // Runs that follow one another on both sides are one.
  void add(uint64_t to, uint64_t from, uint64_t count) {
    if (!bytes.empty() && dst.back() + bytes.back() == to && src.back() + bytes.back() == from) {
      bytes.back() += count;
      return;
    }
    dst.push_back(to);
    src.push_back(from);
    bytes.push_back(count);
  }
};

// Of a plan that converts nothing.
inline Runs runs_of(const CopyPlan& plan) {
  Runs runs;
  for (const CopyParams& p : plan.parts()) {
    const Axis& inner = p.axis[kAxes - 1];
    for (uint32_t number = 0; number < p.items(); ++number) {
      const Item item = find_item(p, number, 2);
      for (uint32_t i = 0; i < inner.count.by; ++i)
        runs.add(item.at[kDst] + offset(p, inner, kDst, i),
                 item.at[kSrc] + offset(p, inner, kSrc, i), p.run);
    }
  }
  return runs;
}

}  // namespace lmcache
