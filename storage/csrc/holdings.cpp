#include "holdings.hpp"

#include "long_chains.hpp"
#include "page_tag.hpp"
#include "tag_sets.hpp"

namespace lmcache {

namespace {

constexpr size_t kWalkedAtOnce = 4096;  // pages of one snapshot: a millisecond or two

// The last key there could be before a namespace's first; none before the first namespace of all.
std::optional<Key> before(std::string_view space) {
  std::string name(space);
  for (auto last = name.rbegin(); last != name.rend(); ++last)
    if ((*last)-- != '\0') return Key::of(name, std::string(kHashBytes, '\xff'));
  return std::nullopt;
}

}  // namespace

// Visits every whole page whose key comes after `after`, until there is none or `visit` says no.
template <class Visit>
void Holdings::walk(std::optional<Key> after, const Visit& visit) {
  for (bool more = true; more;) {
    const std::optional<Key> from = after;
    const Index::Read snapshot(index_);
    snapshot.walk(from ? &*from : nullptr, kWalkedAtOnce, [&](const Key& key, const Found& found) {
      after = key;
      if (more && found.kind == Found::Kind::Present) more = visit(key, found.entry);
    });
    more = more && after != from;
  }
}

std::vector<uint64_t> Holdings::tags(const std::optional<std::vector<std::string>>& spaces,
                                     uint64_t least) {
  std::vector<uint64_t> tags;
  LongChains chains;
  std::string current(kNamespaceBytes, '\0');
  const auto add = [&](const Key& key, const Entry& entry) {
    if (key.space() != current) chains.take(least, tags);
    current = key.space();
    chains.add(key.tag(), entry.parent, page_tag(key.view().data()));
  };
  if (!spaces) {
    walk(std::nullopt, [&](const Key& key, const Entry& entry) {
      add(key, entry);
      return true;
    });
  } else {
    for (const std::string& space : *spaces)
      walk(before(space), [&](const Key& key, const Entry& entry) {
        const bool inside = key.space() == space;
        if (inside) add(key, entry);
        return inside;
      });
  }
  chains.take(least, tags);
  sort_tags(tags);
  return tags;
}

}  // namespace lmcache
