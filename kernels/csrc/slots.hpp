// Lists of slots: whether a copy may go by them, and which of them follow one another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.hpp"

namespace lmcache {

using SlotList = std::vector<int64_t>;  // the first slot of each piece

struct SlotError : std::out_of_range {
  using std::out_of_range::out_of_range;
};

// Each piece is of one page of the layout. Throws LayoutError or SlotError, which name the
// argument.
inline void require_pieces(const std::string& name, const SlotList& slots, uint32_t tokens,
                           const Layout& where) {
  if (slots.size() >= uint64_t{1} << 31) throw LayoutError(name + ": too many for one copy");
  if (tokens == 0 || tokens > where.page_size)
    throw LayoutError("tokens: " + std::to_string(tokens) + " of pages of " +
                      std::to_string(where.page_size));
  const auto count = static_cast<int64_t>(where.slots());
  for (const int64_t slot : slots) {
    if (slot < 0 || slot >= count)
      throw SlotError(name + ": " + std::to_string(slot) + " is not one of " +
                      std::to_string(count));
    if (slot % where.page_size + tokens > where.page_size)
      throw SlotError(name + ": " + std::to_string(tokens) + " tokens from " +
                      std::to_string(slot) + " reach into the next page");
  }
}

[[noreturn]] inline void refuse_twice(const std::string& name, int64_t slot) {
  throw SlotError(name + ": slot " + std::to_string(slot) + " is in it twice");
}

inline void mark_each_once(const std::string& name, const SlotList& slots, uint32_t tokens,
                           uint64_t count) {
  std::vector<bool> taken(count);
  for (const int64_t slot : slots)
    for (uint32_t token = 0; token < tokens; ++token) {
      if (taken[slot + token]) refuse_twice(name, slot + token);
      taken[slot + token] = true;
    }
}

// No slot is in two pieces; `count` slots are there to choose from.
inline void require_each_once(const std::string& name, const SlotList& slots, uint32_t tokens,
                              uint64_t count) {
  const auto too_close = [tokens](int64_t a, int64_t b) { return b < a + int64_t{tokens}; };
  if (std::adjacent_find(slots.begin(), slots.end(), too_close) == slots.end()) return;
  // A mark for each slot takes less time than sorting, but for a few slots of a large pool.
  constexpr uint64_t kMarksASlot = 4096;
  if (count / kMarksASlot <= slots.size()) return mark_each_once(name, slots, tokens, count);
  SlotList sorted = slots;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end(), too_close);
  if (twice != sorted.end()) refuse_twice(name, *(twice + 1));
}

// Whether each `by` pieces from `first` to `last` follow one another within a page.
inline bool in_spans(const SlotList& slots, size_t first, size_t last, uint32_t by, uint32_t tokens,
                     uint32_t page_size) {
  for (size_t i = first; i < last; i += by) {
    if (slots[i] % page_size + int64_t{by} * tokens > page_size) return false;
    for (size_t j = 1; j < by; ++j)
      if (slots[i + j] != slots[i] + static_cast<int64_t>(j) * tokens) return false;
  }
  return true;
}

}  // namespace lmcache
