// Lists of numbered pages, each in one list at most.
#pragma once

#include <cstdint>
#include <vector>

namespace lmcache {

inline constexpr uint32_t kNoPage = 0xFFFFFFFF;

struct PageList {
  uint32_t newest = kNoPage, oldest = kNoPage;
  uint32_t count = 0;
};

class PageLinks {
 public:
  explicit PageLinks(uint32_t pages) : links_(pages) {}

  uint32_t newer(uint32_t page) const { return links_[page].newer; }

  void push_newest(PageList& list, uint32_t page) {
    links_[page] = {kNoPage, list.newest};
    (list.newest == kNoPage ? list.oldest : links_[list.newest].newer) = page;
    list.newest = page;
    ++list.count;
  }
  void unlink(PageList& list, uint32_t page) {
    const Link its = links_[page];
    (its.newer == kNoPage ? list.newest : links_[its.newer].older) = its.older;
    (its.older == kNoPage ? list.oldest : links_[its.older].newer) = its.newer;
    --list.count;
  }
  // All of `from` behind the oldest of `to`.
  void append(PageList& to, PageList& from) {
    if (from.count == 0) return;
    if (to.count == 0) {
      to = from;
    } else {
      links_[to.oldest].older = from.newest;
      links_[from.newest].newer = to.oldest;
      to.oldest = from.oldest;
      to.count += from.count;
    }
    from = PageList();
  }

 private:
  struct Link {
    uint32_t newer = kNoPage, older = kNoPage;
  };
  std::vector<Link> links_;
};

}  // namespace lmcache
