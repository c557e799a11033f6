// Sets of page tags: sorted, each once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

namespace lmcache {

inline void sort_tags(std::vector<uint64_t>& tags) {
  std::sort(tags.begin(), tags.end());
  tags.erase(std::unique(tags.begin(), tags.end()), tags.end());
}

inline std::vector<uint64_t> tags_of_either(const std::vector<uint64_t>& one,
                                            const std::vector<uint64_t>& other) {
  std::vector<uint64_t> both;
  both.reserve(one.size() + other.size());
  std::set_union(one.begin(), one.end(), other.begin(), other.end(), std::back_inserter(both));
  return both;
}

inline std::vector<uint64_t> tags_without(const std::vector<uint64_t>& tags,
                                          const std::vector<uint64_t>& others) {
  std::vector<uint64_t> rest;
  std::set_difference(tags.begin(), tags.end(), others.begin(), others.end(),
                      std::back_inserter(rest));
  return rest;
}

}  // namespace lmcache
