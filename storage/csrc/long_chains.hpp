// Which pages of one namespace are of a chain that is long enough.
#pragma once

#include <cstdint>
#include <vector>

#include "key.hpp"

namespace lmcache {

class LongChains {
 public:
  // In the order of the keys.
  void add(Tag hash, Tag parent, uint64_t tag);
  // Appends the tags of the pages whose chain has at least so many, and begins anew.
  void take(uint64_t least, std::vector<uint64_t>& tags);

 private:
  struct Page {
    uint64_t order;  // the first bytes of its hash, as a number that sorts like them
    Tag parent;
    uint64_t tag;
    uint32_t before = 0;  // its parent's place in the list
    uint32_t above = 1;   // pages from where the chain begins to this one
    uint32_t below = 1;   // pages from this one to the last of its descendants
    uint32_t children = 0;
  };
  uint32_t place_of(Tag hash) const;
  void join();
  void measure();

  std::vector<Page> pages_;
};

}  // namespace lmcache
