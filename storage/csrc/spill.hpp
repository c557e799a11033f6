// From one store to the one below it, in place: no page is copied on the way.
#pragma once

#include "slab_store.hpp"

namespace lmcache {

struct Spilled {
  uint64_t pages = 0, bytes = 0;  // that were tried
  uint64_t refused = 0, failed = 0, damaged = 0;
};

// Writes pages that wait for it, `bytes_most` of them or one, in one group with one flush. Throws
// Failure when the store below cannot be written to; the pages stay where they are.
inline Spilled spill(SlabStore& upper, SlabStore& lower, uint64_t bytes_most,
                     const Limits& limits) {
  const std::vector<Lent> lent = upper.lend(bytes_most, limits.deadline);
  Spilled result;
  std::vector<Key> keys;
  std::vector<std::span<const Segment>> pages;
  std::vector<uint64_t> bytes, checksums;
  std::vector<Tag> parents;
  for (const Lent& page : lent) {
    keys.push_back(page.key);
    pages.emplace_back(&page.page, 1);
    bytes.push_back(page.page.bytes);
    checksums.push_back(page.checksum);
    parents.push_back(page.parent);
    ++result.pages;
    result.bytes += page.page.bytes;
  }
  std::vector<Stored> outcome(lent.size(), Stored::Failed);
  // What was lent is settled whatever happens; later than the deadline, if need be.
  const auto settle = [&] {
    const auto later = [] { return Clock::now() + std::chrono::seconds(5); };
    const auto gone = upper.settle(lent, outcome, later());
    if (gone.empty()) return;
    try {
      lower.remove(gone, later());
    } catch (...) {
      upper.let_go(lent, gone, false, later());
      throw;
    }
    upper.let_go(lent, gone, true, later());
  };
  if (lent.empty()) {  // but something may be left from before
    settle();
    return result;
  }
  try {
    outcome = lower.put({keys, pages, bytes}, checksums, parents, Spill::Never, limits);
  } catch (...) {
    settle();
    throw;
  }
  settle();
  std::vector<Key> damaged;
  for (size_t i = 0; i < lent.size(); ++i)
    if (outcome[i] == Stored::Damaged) damaged.push_back(lent[i].key);
  if (!damaged.empty()) upper.remove(damaged, Clock::now() + std::chrono::seconds(5));
  for (const Stored one : outcome) {
    result.refused += one == Stored::Refused;
    result.failed += one == Stored::Failed || one == Stored::Late;
    result.damaged += one == Stored::Damaged;
  }
  return result;
}

}  // namespace lmcache
