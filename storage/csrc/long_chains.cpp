#include "long_chains.hpp"

#include <algorithm>
#include <bit>

namespace lmcache {

namespace {

constexpr uint32_t kNowhere = ~uint32_t{0};

uint64_t order_of(Tag hash) {
  return std::endian::native == std::endian::little ? __builtin_bswap64(hash) : hash;
}

}  // namespace

void LongChains::add(Tag hash, Tag parent, uint64_t tag) {
  pages_.push_back({order_of(hash), parent, tag});
}

uint32_t LongChains::place_of(Tag hash) const {
  const uint64_t order = order_of(hash);
  const auto at =
      std::lower_bound(pages_.begin(), pages_.end(), order,
                       [](const Page& page, uint64_t order) { return page.order < order; });
  if (at == pages_.end() || at->order != order) return kNowhere;
  return static_cast<uint32_t>(at - pages_.begin());
}

void LongChains::join() {
  for (Page& page : pages_) {
    page.before = page.parent == 0 ? kNowhere : place_of(page.parent);
    if (page.before != kNowhere) ++pages_[page.before].children;
  }
}

// Leaves first, each page after all of its children; then back. Pages whose parents lead round in a
// circle, as damage or two hashes of one beginning may have it, are never come to: they count as
// chains of one page.
void LongChains::measure() {
  std::vector<uint32_t> order;
  order.reserve(pages_.size());
  for (uint32_t i = 0; i < pages_.size(); ++i)
    if (pages_[i].children == 0) order.push_back(i);
  for (size_t next = 0; next < order.size(); ++next) {
    const Page& page = pages_[order[next]];
    if (page.before == kNowhere) continue;
    Page& parent = pages_[page.before];
    parent.below = std::max(parent.below, page.below + 1);
    if (--parent.children == 0) order.push_back(page.before);
  }
  for (auto last = order.rbegin(); last != order.rend(); ++last)
    if (Page& page = pages_[*last]; page.before != kNowhere)
      page.above = pages_[page.before].above + 1;
}

void LongChains::take(uint64_t least, std::vector<uint64_t>& tags) {
  if (least > 1) {
    join();
    measure();
  }
  for (const Page& page : pages_)
    if (uint64_t{page.above} + page.below - 1 >= least) tags.push_back(page.tag);
  pages_.clear();
}

}  // namespace lmcache
