// The volatile half of a store, made anew from its index.
#include "rebuild.hpp"

#include <algorithm>
#include <array>
#include <cstring>

namespace lmcache {

namespace {

constexpr size_t kAll = SIZE_MAX;

}  // namespace

void SlabStore::rebuild() {
  Rebuild(*this).run();
  rebuild_next_ = false;
  control_.header().ready = kWhole;
}

// Other processes may be writing into slots that they reserved, or have pages read by others where
// they lie: those stay theirs, whatever becomes of this. So nothing is changed before all that can
// fail has been done once, and what says that a slot is reserved (its state and owner, its slab's
// class, its namespace's name) is never unsaid.
void Rebuild::run() {
  // A process may have died when its commit was written and not yet shown to readers: the next
  // writer's first step is to show it.
  {
    const Index::Write show_last_commit(store_.index_);
  }
  remember_what_is_held();
  {
    const Index::Read snapshot(store_.index_);
    placed_.reserve(snapshot.walk(nullptr, kAll, [this](const Key&, const Found& found) {
      if (found.kind == Found::Kind::Present) look_for_conflict(found.entry);
    }));
    clear_all_but_held();
    snapshot.walk(nullptr, kAll, [this](const Key& key, const Found& found) { place(key, found); });
    for (const Placed& page : placed_) count_child(snapshot, page);
    read_pins_and_quotas(snapshot);
    store_.damaged_at_open_ += bad_.size();
    look_for_leftovers(snapshot);
  }
  fill_free_lists();
  line_up();
  mend_index();
}

void Rebuild::remember_what_is_held() {
  for (uint32_t number = 0; number < control_.shape().slabs; ++number) {
    const Slab& slab = control_.slab(number);
    if (slab.kind >= kClasses || !is_sound(slab.kind)) continue;
    for (uint32_t i = 0; i < control_.kind(slab.kind).slots; ++i) {
      const uint32_t slot = number * control_.shape().slots_per_slab + i;
      if (is_shown(control_.slot(slot))) shown_[slot] = control_.slot(slot).owner;
      if (is_held(control_.slot(slot))) held_[number].insert(slot);
    }
  }
}

// Whether the class is one that `kind_for` could have made, and finds again.
bool Rebuild::is_sound(uint32_t number) const {
  const Class& kind = control_.kind(number);
  const Shape& shape = control_.shape();
  const uint64_t bytes = kind.slot_blocks * kBlock;
  if (bytes == 0 || bytes > shape.slab_bytes) return false;
  if (kind.slots != std::min<uint64_t>(shape.slab_bytes / bytes, shape.slots_per_slab))
    return false;
  for (uint32_t other = 0; other < number; ++other)
    if (control_.kind(other).slot_blocks == kind.slot_blocks) return false;
  return true;
}

bool Rebuild::is_held(const Slot& slot) const {
  return slot.state == State::Reserved && slot.owner != 0 && slot.owner < kOwners &&
         ((slot.flags & kSpilling) == 0 || is_shown(slot)) && slot.space < kSpaces &&
         store_.owners_.alive(slot.owner);
}

bool Rebuild::is_shown(const Slot& slot) const {
  constexpr uint8_t both = kSpilling | kShown;
  return slot.state != State::Free && (slot.flags & both) == both && slot.owner != 0 &&
         slot.owner < kOwners && store_.owners_.alive(slot.owner);
}

// What the index says goes before: a change that reserved slots and was never committed wrote
// nothing into them, and may have given the slab another class.
void Rebuild::look_for_conflict(const Entry& entry) {
  const uint32_t slot = store_.slot_of(entry);
  if (slot == kNone) return;
  const auto slab = held_.find(control_.slab_of(slot));
  if (slab == held_.end()) return;
  if (control_.slot_bytes(slot) != store_.slot_bytes_for(entry.length))
    held_.erase(slab);
  else if (slab->second.erase(slot) != 0 && slab->second.empty())
    held_.erase(slab);
}

// No slot keeps its state by itself: the slab may come out of this with larger slots, and fewer of
// them.
void Rebuild::clear_all_but_held() {
  const Slots nothing;
  std::array<uint32_t, kClasses> slabs{};
  std::array<std::array<uint64_t, 2>, kSpaces> taken{};  // pages and bytes
  for (uint32_t number = 0; number < control_.shape().slabs; ++number) {
    Slab& slab = control_.slab(number);
    const auto held = held_.find(number);
    if (slab.kind < kClasses) clear_slots(number, held == held_.end() ? nothing : held->second);
    if (held == held_.end()) {
      slab = {kNone, 0};
      continue;
    }
    ++slabs[slab.kind];
    slab.live = static_cast<uint32_t>(held->second.size());
    for (const uint32_t slot : held->second) {
      auto& [pages, bytes] = taken[control_.slot(slot).space];
      ++pages;
      bytes += control_.slot_bytes(slot);
    }
  }
  control_.clear_counts();
  for (uint32_t kind = 0; kind < kClasses; ++kind) control_.clear_class(kind, slabs[kind]);
  for (uint32_t i = 0; i < kSpaces; ++i) control_.space(i).take(taken[i][0], taken[i][1]);
  for (const auto& [slab, slots] : held_)
    for (const uint32_t slot : slots)
      if (shown_.contains(slot))
        ++control_.owner(control_.slot(slot).owner).held;  // a page that was removed meanwhile
      else
        store_.count_reserved(slot);
}

void Rebuild::clear_slots(uint32_t slab, const Slots& held) {
  const uint32_t slots =
      std::min(control_.kind(control_.slab(slab).kind).slots, control_.shape().slots_per_slab);
  for (uint32_t i = 0; i < slots; ++i) {
    const uint32_t slot = slab * control_.shape().slots_per_slab + i;
    if (!held.contains(slot)) control_.reset_slot(slot);
  }
}

bool Rebuild::take(uint32_t slot, uint64_t slot_bytes) {
  const uint32_t number = control_.slab_of(slot);
  Slab& slab = control_.slab(number);
  const uint32_t kind = store_.kind_for(slot_bytes);
  if (kind == kNone || (slab.kind != kNone && slab.kind != kind)) return false;
  if (slab.kind == kNone) {
    slab.kind = kind;
    ++control_.kind(kind).slabs;
    control_.reset_slots(number, control_.kind(kind).slots);
  } else if (control_.slot(slot).state != State::Free) {
    return false;  // two entries, one slot
  }
  ++slab.live;
  return true;
}

void Rebuild::place(const Key& key, const Found& found) {
  const Entry& entry = found.entry;
  const uint32_t number = found.kind == Found::Kind::Present ? store_.slot_of(entry) : kNone;
  if (number == kNone || control_.intern_space(key.space()) == kNone ||
      !take(number, store_.slot_bytes_for(entry.length))) {
    bad_.push_back(key);
    return;
  }
  Slot& slot = control_.slot(number);
  const bool same = slot.generation == entry.generation &&
                    std::memcmp(slot.hash, key.hash().data(), kHashBytes) == 0;
  if (!same) slot.tick = slot.visited = 0;
  // The clock begins anew with the control block; what was used before must not seem used now.
  if (Header& header = control_.header(); header.clock < slot.tick) header.clock = slot.tick.load();
  occupy(number, key, State::Live);
  slot.generation = entry.generation;
  if (same && shown_.contains(number)) show_again(number);
  Header& header = control_.header();
  ++header.pages;
  header.bytes += control_.slot_bytes(number);
  header.sequence = std::max(header.sequence, entry.sequence + 1);
  placed_.push_back({entry.sequence, number, entry.parent});
}

void Rebuild::show_again(uint32_t number) {
  Slot& slot = control_.slot(number);
  slot.owner = shown_.at(number);
  slot.flags = kSpilling | kShown;
  ++control_.owner(slot.owner).held;
}

void Rebuild::occupy(uint32_t number, const Key& key, State state) {
  Slot& slot = control_.slot(number);
  const uint32_t space = control_.intern_space(key.space());
  std::memcpy(slot.hash, key.hash().data(), kHashBytes);
  slot.space = static_cast<uint16_t>(space);
  slot.state = state;
  slot.queue = Queue::None;
  slot.owner = 0;
  slot.children = 0;
  slot.pinned_until = 0;
  slot.flags = 0;
  Space& its = control_.space(space);
  ++its.pages;
  its.bytes += control_.slot_bytes(number);
}

void Rebuild::count_child(const Index::Read& snapshot, const Placed& page) {
  if (page.parent == 0) return;
  const Key key = control_.key_of(page.slot);
  const auto parent = snapshot.find_tag(key.space(), page.parent);
  const uint32_t slot = parent ? store_.slot_of(parent->second) : kNone;
  if (slot != kNone && control_.slot(slot).state == State::Live &&
      control_.key_of(slot) == parent->first)
    ++control_.slot(slot).children;
  else
    ++orphans_[Index::tagged(key.space(), page.parent)];
}

// What the index says of pages that are not here, and what it should.
void Rebuild::look_for_leftovers(const Index::Read& snapshot) {
  snapshot.walk_orphans([this](std::string_view parent, uint32_t count) {
    const auto counted = orphans_.try_emplace(std::string(parent), 0).first;
    if (counted->second == count) orphans_.erase(counted);
  });
  snapshot.walk_pins([&](const Key& key, uint32_t) {
    if (snapshot.find(key).kind != Found::Kind::Present) bad_.push_back(key);
  });
}

void Rebuild::read_pins_and_quotas(const Index::Read& snapshot) {
  snapshot.walk_quotas([this](std::string_view space, uint64_t bytes) {
    const uint32_t number = control_.intern_space(space);
    if (number != kNone) control_.space(number).quota = bytes;
  });
  snapshot.walk_pins([&](const Key& key, uint32_t until) {
    const Found found = snapshot.find(key);
    const uint32_t slot = found.kind == Found::Kind::Present ? store_.slot_of(found.entry) : kNone;
    if (slot != kNone) control_.slot(slot).pinned_until = until;
  });
}

void Rebuild::fill_free_lists() {
  for (uint32_t number = 0; number < control_.shape().slabs; ++number) {
    if (control_.slab(number).kind == kNone) continue;
    Class& kind = control_.kind(control_.slab(number).kind);
    const uint32_t first = number * control_.shape().slots_per_slab;
    for (uint32_t i = kind.slots; i-- > 0;)
      if (control_.slot(first + i).state == State::Free)
        control_.push_newest(kind.free, first + i, Queue::Free);
  }
}

// In the order in which they came; what the tier below lacks is not known, so it is offered all.
void Rebuild::line_up() {
  std::sort(placed_.begin(), placed_.end(),
            [](const Placed& a, const Placed& b) { return a.sequence < b.sequence; });
  const Spill below = store_.options_.below;
  for (const Placed& page : placed_) {
    if (below == Spill::Now) {
      store_.make_dirty(page.slot);
      continue;
    }
    if (below != Spill::Never) control_.slot(page.slot).flags.fetch_or(kUnspilled);
    store_.enlist(page.slot);
  }
}

void Rebuild::mend_index() {
  for (size_t i = 0; i < bad_.size(); i += kIndexBatch) {
    Index::Write changes(store_.index_);
    for (size_t j = i; j < std::min(bad_.size(), i + kIndexBatch); ++j) {
      changes.erase(bad_[j]);
      changes.set_pin(bad_[j], 0);
    }
    changes.commit();
  }
  for (auto it = orphans_.begin(); it != orphans_.end();) {
    Index::Write changes(store_.index_);
    for (size_t some = 0; some < kIndexBatch && it != orphans_.end(); ++some, ++it)
      changes.set_orphans(it->first, it->second);
    changes.commit();
  }
}

}  // namespace lmcache
