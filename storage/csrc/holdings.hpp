// What a store holds, as tags: what a node tells its peers.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "slab_store.hpp"

namespace lmcache {

class Holdings {
 public:
  explicit Holdings(SlabStore& store) : index_(store.index_) {}

  // A number that is another one after each change of what is held, by any process.
  uint64_t changed() { return index_.last_change(); }

  // Of all pages, or of those of some namespaces; sorted, each once. least: pages of the shortest
  // chain that counts, from where it begins here to the last descendant that is here.
  //
  // No snapshot is held for long: a page that comes or goes meanwhile may or may not be among them.
  std::vector<uint64_t> tags(const std::optional<std::vector<std::string>>& spaces, uint64_t least);

 private:
  template <class Visit>
  void walk(std::optional<Key> after, const Visit& visit);

  Index& index_;
};

}  // namespace lmcache
