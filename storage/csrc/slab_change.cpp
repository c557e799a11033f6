// What happens under the mutex: slots are taken, pages give way, written pages become visible.
#include <algorithm>
#include <bitset>
#include <cstring>
#include <ctime>
#include <unordered_map>
#include <unordered_set>

#include "change.hpp"
#include "steps.hpp"

namespace lmcache {

namespace {

constexpr auto kRoomWait =
    std::chrono::seconds(2);  // longest wait for the tier below to take pages
constexpr uint64_t kQueuedMost = 64 << 20;
constexpr uint64_t kQuotaParts = 16;  // of a quota, one is freed at a time
constexpr uint32_t kOlder = 2;        // a slab changes class when its pages are so many times older

uint32_t seconds_now() { return static_cast<uint32_t>(std::time(nullptr)); }

}  // namespace

void SlabStore::ensure_whole() {
  if (control_.header().ready.load() == kBroken) rebuild();
}

// What this process could not give back in time when it was done with it.
void SlabStore::settle_left_over() {
  std::vector<Job> jobs;
  std::vector<std::pair<Lent, Stored>> pages;
  {
    const std::lock_guard guard(abandoned_lock_);
    jobs.swap(abandoned_);
    pages.swap(unsettled_);
  }
  size_t done = 0;
  try {
    for (const Job& job : jobs) release(job);
    for (; done < pages.size(); ++done) settle_late(pages[done].first, pages[done].second);
  } catch (...) {
    const std::lock_guard guard(abandoned_lock_);
    unsettled_.insert(unsettled_.end(), pages.begin() + static_cast<ptrdiff_t>(done), pages.end());
    throw;
  }
  if (!pages.empty()) advance(control_.header().room);
}

void SlabStore::settle_late(const Lent& page, Stored outcome) {
  if (settle_one(page, outcome)) return;
  gone_.push_back(page.key);
  let_go_one(page);
}

// Reserves slots for the wanted pages, the first ones first. Of the batch's pages that are present
// those before a wanted one do not give way to it, those behind may: without it they are of no use.
// Waits, within the deadline, for pages on their way to the tier below, once; when they do not
// move, they are given up for room.
void SlabStore::reserve(const Batch& batch, std::span<const size_t> wanted,
                        std::span<const uint32_t> present, uint32_t now, const Limits& limits,
                        bool patient, std::vector<Job>& jobs) {
  size_t done = 0;
  while (done < wanted.size()) {
    uint32_t seen;
    const bool may_wait = patiently(limits.deadline, [&] {
      const Change change(*this, limits.deadline);
      for (; jobs.size() > done; jobs.pop_back()) release(jobs.back());  // an attempt that failed
      seen = room_seen();
      reserve_some(batch, wanted.subspan(done), present, now, stalled_at_ == seen, jobs);
      const Header& header = control_.header();
      return header.dirty.count != 0 || header.spilling_bytes != 0;
    });
    done = jobs.size();
    if (done == wanted.size() || !may_wait || !patient) return;
    wake();
    if (stalled_at_ == seen || limits.passed()) return;
    const Deadline patience = Clock::now() + kRoomWait;
    if (!wait_for_room(seen, std::min(limits.deadline, patience)) && patience <= limits.deadline)
      stalled_at_ = seen;  // a caller in more of a hurry than that proves nothing
  }
}

// How many of the first pages got a slot.
size_t SlabStore::reserve_some(const Batch& batch, std::span<const size_t> wanted,
                               std::span<const uint32_t> present, uint32_t now, bool force,
                               std::vector<Job>& jobs) {
  if (step(Step::Reserve, 0, wanted.size()) != 0) throw Failure(Reason::Io, "injected");
  jobs.reserve(jobs.size() + wanted.size());  // not once slots are taken: it may fail
  Eviction eviction(index_);
  size_t done = 0, kept = 0;
  for (const size_t page : wanted) {
    for (; kept < page; ++kept)
      if (present[kept] != kNone) control_.slot(present[kept]).tick = now;
    const uint32_t space = number_of_space(batch.keys[page].space(), now, eviction);
    const uint32_t slot =
        space == kNone ? kNone : take_slot(batch.bytes[page], space, now, force, eviction);
    if (slot == kNone) break;
    reserve_slot(slot, space, batch.keys[page]);
    jobs.push_back({page, slot, control_.slot(slot).generation.load()});
    ++done;
  }
  eviction.commit();
  // From here on no older copy of an entry leads to what these slots will hold. Not before: until
  // the removals are committed, an entry with the old number is a true one.
  for (size_t j = jobs.size() - done; j < jobs.size(); ++j)
    jobs[j].generation = control_.slot(jobs[j].slot).generation.fetch_add(1) + 1;
  return done;
}

// The namespace's number. There are only so many: the one used longest ago makes way, as a whole.
uint32_t SlabStore::number_of_space(std::string_view name, uint32_t now, Eviction& eviction) {
  uint32_t number = control_.intern_space(name);
  if (number == kNone) {
    const uint32_t oldest = oldest_space(now);
    if (oldest == kNone) return kNone;
    forget_space(oldest, eviction);
    number = control_.intern_space(name);
  }
  if (number != kNone) control_.space(number).tick = now;
  return number;
}

// Of those that may go: without a quota, and with no page that must stay.
uint32_t SlabStore::oldest_space(uint32_t now) {
  std::bitset<kSpaces> stays;
  for_each_slot([&](uint32_t, const Slot& slot) {
    if (slot.state != State::Free && slot.space < kSpaces && must_stay(slot, now))
      stays.set(slot.space);
  });
  uint32_t oldest = kNone;
  for (uint32_t i = 0; i < kSpaces; ++i) {
    const Space& it = control_.space(i);
    if (it.quota != 0 || stays[i]) continue;
    if (oldest == kNone || now - it.tick > now - control_.space(oldest).tick) oldest = i;
  }
  return oldest;
}

void SlabStore::forget_space(uint32_t number, Eviction& eviction) {
  const std::string name(reinterpret_cast<const char*>(control_.space(number).name),
                         kNamespaceBytes);
  for (;;) {
    const auto pages = eviction.changes().in_space(name, kIndexBatch);
    for (const auto& [key, found] : pages) {
      drop(key, found, eviction.changes());
      ++control_.header().evicted;
      eviction.count_one();
    }
    if (pages.size() < kIndexBatch) return;
  }
}

uint32_t SlabStore::take_slot(uint64_t page_bytes, uint32_t space, uint32_t now, bool force,
                              Eviction& eviction) {
  const uint64_t bytes = slot_bytes_for(page_bytes);
  if (bytes > options_.shape.slab_bytes) return kNone;
  const Space& its = control_.space(space);
  if (its.quota != 0 && bytes > its.quota) return kNone;
  while (its.quota != 0 && its.bytes + bytes > its.quota &&
         !evict_from_space(space, its.quota - bytes, bytes, now, eviction))
    if (!force || !give_up_dirty(space)) return kNone;
  while (control_.header().pages + control_.header().reserved >= options_.pages_most)
    if (!evict_any(now, eviction) && !(force && give_up_dirty(kNone))) return kNone;
  const uint32_t kind = kind_for(bytes);
  if (kind == kNone) return kNone;
  while (control_.kind(kind).free.count == 0) {
    if (make_room(kind, now, eviction)) continue;
    if (!force || !give_up_dirty(kNone)) return kNone;
  }
  return control_.kind(kind).free.newest;
}

// The number of the class with slots of this size.
uint32_t SlabStore::kind_for(uint64_t slot_bytes) {
  const auto blocks = static_cast<uint32_t>(slot_bytes / kBlock);
  uint32_t unused = kNone;
  for (uint32_t i = 0; i < kClasses; ++i) {
    const Class& kind = control_.kind(i);
    if (kind.slot_blocks == blocks) return i;
    if (kind.slabs == 0 && unused == kNone) unused = i;
  }
  if (unused == kNone) return kNone;
  Class& kind = control_.kind(unused);
  const List empty{kNone, kNone, 0};
  const auto slots = static_cast<uint32_t>(options_.shape.slab_bytes / slot_bytes);
  kind = {blocks, std::min(slots, options_.shape.slots_per_slab), 0, empty, empty, empty, kNone,
          {}};
  return unused;
}

bool SlabStore::make_room(uint32_t kind, uint32_t now, Eviction& eviction) {
  if (carve(kind)) return true;
  const uint32_t rival = rival_of(kind, now);
  if (rival != kNone && steal(kind, rival, now, eviction)) return true;
  if (evict_one(kind, now, eviction)) return true;
  for (uint32_t other = 0; other < kClasses; ++other)
    if (other != kind && control_.kind(other).slabs != 0 && steal(kind, other, now, eviction))
      return true;
  return false;
}

// Gives the class a slab that holds nothing.
bool SlabStore::carve(uint32_t kind) {
  for (uint32_t number = 0; number < options_.shape.slabs; ++number) {
    Slab& slab = control_.slab(number);
    if (slab.kind == kind || slab.live != 0) continue;
    if (slab.kind != kNone) empty(number);
    assign(number, kind);
    return true;
  }
  return false;
}

// Takes a slab without a live slot out of its class.
void SlabStore::empty(uint32_t number) {
  Slab& slab = control_.slab(number);
  Class& was = control_.kind(slab.kind);
  const uint32_t first = number * options_.shape.slots_per_slab;
  for (uint32_t i = 0; i < was.slots; ++i) control_.unlink(was.free, first + i);
  --was.slabs;
  slab = {kNone, 0};
}

void SlabStore::assign(uint32_t number, uint32_t kind) {
  Class& its = control_.kind(kind);
  control_.slab(number) = {kind, 0};
  ++its.slabs;
  const uint32_t first = number * options_.shape.slots_per_slab;
  control_.reset_slots(number, its.slots);
  for (uint32_t i = its.slots; i-- > 0;)  // so that they are taken in the order they lie
    control_.push_newest(its.free, first + i, Queue::Free);
}

// Another class whose next page to go has not been used for much longer than this class's.
uint32_t SlabStore::rival_of(uint32_t kind, uint32_t now) {
  const uint32_t own = policy_->oldest(control_.kind(kind));
  uint64_t age = own == kNone ? 0 : uint64_t{kOlder} * (now - own);
  uint32_t rival = kNone;
  for (uint32_t other = 0; other < kClasses; ++other) {
    if (other == kind || control_.kind(other).slabs == 0) continue;
    const uint32_t oldest = policy_->oldest(control_.kind(other));
    if (oldest == kNone || now - oldest <= age) continue;
    age = now - oldest;
    rival = other;
  }
  return rival;
}

// Empties a slab of the other class, the one with its next page to go if that can be, and takes it.
bool SlabStore::steal(uint32_t kind, uint32_t from, uint32_t now, Eviction& eviction) {
  const Class& other = control_.kind(from);
  const uint32_t next = other.small.oldest != kNone ? other.small.oldest : other.main.oldest;
  const uint32_t preferred = next == kNone ? 0 : control_.slab_of(next);
  std::optional<Kin> kin;
  for (uint32_t i = 0; i < options_.shape.slabs; ++i) {
    const uint32_t number = (preferred + i) % options_.shape.slabs;
    if (control_.slab(number).kind != from) continue;
    const auto doomed = doomed_with(number, now, kin, eviction);
    if (!doomed) continue;
    evict_leaves_first(*doomed, eviction);
    if (control_.slab(number).live != 0)
      return false;  // a damaged entry: rebuilt after this change
    empty(number);
    assign(number, kind);
    return true;
  }
  if (options_.below == Spill::OnEvict) queue_slab(preferred);
  return false;
}

// Write-back: once its pages are below, the slab can be taken.
void SlabStore::queue_slab(uint32_t number) {
  const Slab& slab = control_.slab(number);
  if (slab.kind == kNone) return;
  const uint32_t first = number * options_.shape.slots_per_slab;
  for (uint32_t i = 0; i < control_.kind(slab.kind).slots; ++i)
    if (control_.slot(first + i).flags & kUnspilled) make_dirty(first + i);
}

// So that nobody sees a page without its ancestors, not even between two commits. Children have
// mostly come after their parents, so one round mostly does.
void SlabStore::evict_leaves_first(std::vector<uint32_t> slots, Eviction& eviction) {
  std::unordered_map<uint32_t, uint64_t> came;
  for (const uint32_t slot : slots)
    came[slot] = eviction.changes().find(control_.key_of(slot)).entry.sequence;
  std::sort(slots.begin(), slots.end(), [&](uint32_t a, uint32_t b) { return came[a] > came[b]; });
  while (!slots.empty()) {
    std::vector<uint32_t> parents;
    for (const uint32_t slot : slots)
      if (control_.slot(slot).children != 0)
        parents.push_back(slot);
      else
        evict(slot, eviction);
    if (parents.size() == slots.size()) {  // a caller named them each other's parents
      evict(parents.back(), eviction);
      parents.pop_back();
    }
    slots.swap(parents);
  }
}

// The pages of a slab and all their descendants, wherever they lie; nothing when one of them must
// stay.
std::optional<std::vector<uint32_t>> SlabStore::doomed_with(uint32_t number, uint32_t now,
                                                            std::optional<Kin>& kin,
                                                            Eviction& eviction) {
  const uint32_t first = number * options_.shape.slots_per_slab;
  std::vector<uint32_t> doomed;
  bool parents = false;
  for (uint32_t i = 0; i < control_.kind(control_.slab(number).kind).slots; ++i) {
    const Slot& slot = control_.slot(first + i);
    if (slot.state == State::Free) continue;
    if (must_stay(slot, now)) return std::nullopt;
    parents = parents || slot.children != 0;
    doomed.push_back(first + i);
  }
  if (parents && !kin) kin = kin_of_all(eviction);
  if (parents && !add_descendants(doomed, now, *kin)) return std::nullopt;
  return doomed;
}

// Who names whom: a walk over all pages.
SlabStore::Kin SlabStore::kin_of_all(Eviction& eviction) {
  Kin kin;
  for_each_slot([&](uint32_t number, const Slot& slot) {
    if (slot.state != State::Live) return;
    const Found found = eviction.changes().find(control_.key_of(number));
    if (found.kind == Found::Kind::Present && found.entry.parent != 0)
      kin.emplace(std::pair(slot.space.load(), found.entry.parent), number);
  });
  return kin;
}

// False when a descendant must stay.
bool SlabStore::add_descendants(std::vector<uint32_t>& doomed, uint32_t now, const Kin& kin) {
  std::unordered_set<uint32_t> taken(doomed.begin(), doomed.end());
  for (size_t i = 0; i < doomed.size(); ++i) {
    const uint16_t space = control_.slot(doomed[i]).space;
    const auto [begin, end] = kin.equal_range({space, control_.key_of(doomed[i]).tag()});
    for (auto child = begin; child != end; ++child) {
      if (taken.contains(child->second)) continue;
      if (must_stay(control_.slot(child->second), now)) return false;
      taken.insert(child->second);
      doomed.push_back(child->second);
    }
  }
  return true;
}

bool SlabStore::must_stay(const Slot& slot, uint32_t now) const {
  return slot.state == State::Reserved || slot.queue == Queue::Dirty ||
         (slot.flags & kSpilling) != 0 || slot.tick == now || slot.pinned_until > seconds_now() ||
         (options_.below == Spill::OnEvict && (slot.flags & kUnspilled) != 0);
}

// Write-back: how much is sent below at a time when pages are to go.
uint64_t SlabStore::queued_at_once() const {
  return std::min(kQueuedMost, options_.shape.region_bytes() / 16);
}

bool SlabStore::evict_one(uint32_t kind, uint32_t now, Eviction& eviction) {
  uint64_t queued = 0;
  Class& its = control_.kind(kind);
  const uint32_t seconds = seconds_now();
  const auto keep = [&](const Slot& slot) {
    return slot.tick == now || slot.pinned_until > seconds;
  };
  for (;;) {
    const uint32_t slot = policy_->pick(its, keep);
    if (slot == kNone) return false;
    if (options_.below == Spill::OnEvict && (control_.slot(slot).flags & kUnspilled) != 0) {
      make_dirty(slot);
      queued += control_.slot_bytes(slot);
      if (queued >= queued_at_once())
        return false;  // soon clean: whoever wants room waits for them
      continue;
    }
    evict(slot, eviction);
    return true;
  }
}

bool SlabStore::evict_any(uint32_t now, Eviction& eviction) {
  for (uint32_t kind = 0; kind < kClasses; ++kind)
    if (control_.kind(kind).slabs != 0 && evict_one(kind, now, eviction)) return true;
  return false;
}

// Leaves a namespace no more than so many bytes, if that can be. Its pages stand among all others,
// so this walks past those; for which it frees some more, in pages of that size, where it frees
// any.
bool SlabStore::evict_from_space(uint32_t space, uint64_t most, uint64_t page_bytes, uint32_t now,
                                 Eviction& eviction) {
  const Space& its = control_.space(space);
  const uint64_t more = its.quota / kQuotaParts / page_bytes * page_bytes;
  // What was used since the last time is spared in the first round, and may end behind the walk.
  for (int round = 0; round < 2 && its.bytes > most; ++round)
    thin_out(space, most - std::min(most, more), now, eviction);
  return its.bytes <= most;
}

// Evicts a namespace's pages, oldest first, until it has no more than so many bytes.
void SlabStore::thin_out(uint32_t space, uint64_t wanted, uint32_t now, Eviction& eviction) {
  const Space& its = control_.space(space);
  uint64_t left = 2 * control_.believable(UINT64_MAX), queued = 0;
  for (uint32_t number = 0; number < kClasses; ++number) {
    const Class& kind = control_.kind(number);
    if (kind.slabs == 0) continue;
    for (const List* list : {&kind.small, &kind.main}) {
      for (uint32_t at = list->oldest, next; at != kNone; at = next) {
        if (its.bytes <= wanted || queued >= queued_at_once()) return;
        if (left-- == 0) throw ControlDamaged("a list leads in a circle");
        next = control_.slot(at).prev;
        if (control_.slot(at).space == space) queued += let_go(at, wanted, now, eviction);
      }
    }
  }
}

// Evicts a page, unless it must stay, or was used since the last time; and its ancestors, which
// come into the lists one after the other, where this walk has been already. Bytes that go below
// first.
uint64_t SlabStore::let_go(uint32_t number, uint64_t wanted, uint32_t now, Eviction& eviction) {
  while (number != kNone) {
    Slot& slot = control_.slot(number);
    if (slot.tick == now || slot.pinned_until > seconds_now()) return 0;
    if (slot.visited.exchange(0) != 0) {
      delist(number);
      enlist(number);
      return 0;
    }
    if (options_.below == Spill::OnEvict && (slot.flags & kUnspilled) != 0) {
      make_dirty(number);
      return control_.slot_bytes(number);
    }
    const Space& its = control_.space(slot.space);
    number = evict(number, eviction);
    if (its.bytes <= wanted) return 0;
  }
  return 0;
}

// The slot of its parent, if that may go now.
uint32_t SlabStore::evict(uint32_t number, Eviction& eviction) {
  const Key key = control_.key_of(number);
  const Found found = eviction.changes().find(key);
  if (found.kind == Found::Kind::Absent)
    throw ControlDamaged("a live slot's page is not in the index");
  const uint32_t parent = drop(key, found, eviction.changes());
  eviction.count_one();
  ++control_.header().evicted;
  return parent;
}

// Takes a page out of index and slots. The slot of its parent, if that may go now.
uint32_t SlabStore::drop(const Key& key, const Found& found, Index::Write& changes) {
  changes.erase(key);
  const uint32_t number = found.kind == Found::Kind::Present ? slot_of(found.entry) : kNone;
  if (number == kNone || control_.slot(number).state != State::Live ||
      control_.key_of(number) != key) {
    rebuild_next_ = true;  // a damaged entry: which slot it had, only a walk tells
    return kNone;
  }
  Slot& slot = control_.slot(number);
  if (slot.pinned_until != 0) changes.set_pin(key, 0);
  if (slot.children != 0) changes.set_orphans(key.space(), key.tag(), slot.children);
  const uint32_t parent = leave_parent(key, found.entry.parent, slot.tick, changes);
  delist(number);
  count_out(number);
  if ((slot.flags & kSpilling) == 0) {
    free_slot(number);
  } else {  // who has it in hand frees it
    slot.state = State::Reserved;
    if ((slot.flags & kShown) == 0) ++control_.header().forgotten;
    if (slot.flags.fetch_and(static_cast<uint8_t>(~kAsked)) & kAsked) --control_.header().asked;
  }
  return parent;
}

void SlabStore::count_out(uint32_t number) {
  Header& header = control_.header();
  --header.pages;
  header.bytes -= control_.slot_bytes(number);
}

void SlabStore::free_slot(uint32_t number, bool suspect) {
  Slot& slot = control_.slot(number);
  Space& space = control_.space(slot.space);
  --space.pages;
  space.bytes -= control_.slot_bytes(number);
  slot.state = State::Free;
  slot.owner = 0;
  slot.children = 0;
  slot.pinned_until = 0;
  slot.flags = 0;
  --control_.slab(control_.slab_of(number)).live;
  List& free = control_.kind_of(number).free;
  if (suspect)
    control_.push_oldest(free, number, Queue::Free);
  else
    control_.push_newest(free, number, Queue::Free);
}

void SlabStore::reserve_slot(uint32_t number, uint32_t space, const Key& key) {
  control_.unlink(control_.kind_of(number).free, number);
  Slot& slot = control_.slot(number);
  std::memcpy(slot.hash, key.hash().data(), kHashBytes);
  slot.space = static_cast<uint16_t>(space);
  slot.owner = owners_.self();
  slot.state = State::Reserved;
  slot.children = 0;
  slot.pinned_until = 0;
  slot.visited = 0;
  slot.flags = 0;
  ++control_.slab(control_.slab_of(number)).live;
  Space& its = control_.space(space);
  ++its.pages;
  its.bytes += control_.slot_bytes(number);
  count_reserved(number);
}

void SlabStore::count_reserved(uint32_t number) {
  ++control_.owner(control_.slot(number).owner).held;
  ++control_.header().reserved;
  control_.header().reserved_bytes += control_.slot_bytes(number);
}

// Whether the slot is still this process's reservation; after another one's death it may not be.
bool SlabStore::is_ours(const Job& job) {
  const Slot& slot = control_.slot(job.slot);
  return slot.state == State::Reserved && slot.owner == owners_.self() &&
         slot.generation == job.generation && (slot.flags & kSpilling) == 0 &&
         control_.is_of_its_slab(job.slot);
}

// suspect: the medium failed there. Then others are used before it.
void SlabStore::release(const Job& job, bool suspect) {
  if (!is_ours(job)) return;
  end_reservation(job.slot);
  free_slot(job.slot, suspect);
}

void SlabStore::end_reservation(uint32_t number) {
  Slot& slot = control_.slot(number);
  --control_.owner(slot.owner).held;
  slot.owner = 0;
  --control_.header().reserved;
  control_.header().reserved_bytes -= control_.slot_bytes(number);
}

// What a dead process held.
size_t SlabStore::reclaim(uint16_t owner) {
  size_t freed = 0;
  for_each_slot([&](uint32_t number, Slot& slot) {
    if (slot.owner != owner) return;
    ++freed;
    if (slot.flags & kShown) return take_back(number);
    if (slot.flags & kSpilling) {
      unhold(number);
      if (slot.state == State::Live) return make_dirty(number);
    } else {
      end_reservation(number);
    }
    free_slot(number);
  });
  control_.owner(owner).held = 0;
  return freed;
}

bool SlabStore::may_give_way(const Slot& slot) const {
  return slot.state == State::Live && slot.children == 0 && slot.queue == Queue::None &&
         (slot.flags & kSpilling) == 0;
}

void SlabStore::enlist(uint32_t number) {
  if (may_give_way(control_.slot(number))) policy_->insert(control_.kind_of(number), number);
}

void SlabStore::delist(uint32_t number) {
  const Slot& slot = control_.slot(number);
  switch (slot.queue) {
    case Queue::None:
      return;
    case Queue::Free:
      throw ControlDamaged("a live slot is among the free ones");
    case Queue::Dirty:
      control_.unlink(control_.header().dirty, number);
      control_.header().dirty_bytes -= control_.slot_bytes(number);
      return;
    case Queue::Small:
    case Queue::Main:
      policy_->forget(control_.kind_of(number), number);
  }
}

// Puts a live page among those that are to be written below.
void SlabStore::make_dirty(uint32_t number) {
  Slot& slot = control_.slot(number);
  slot.flags.fetch_and(static_cast<uint8_t>(~(kUnspilled | kHeld)));
  if (slot.flags & kShown) {
    if (slot.state == State::Live && (slot.flags.fetch_or(kAsked) & kAsked) == 0)
      ++control_.header().asked;
    return;
  }
  if (slot.state != State::Live || slot.queue == Queue::Dirty || (slot.flags & kSpilling) != 0)
    return;
  delist(number);
  control_.push_newest(control_.header().dirty, number, Queue::Dirty);
  control_.header().dirty_bytes += control_.slot_bytes(number);
}

// The tier below does not take pages: the oldest leaf that waits for it, of one namespace or of
// any, may go without.
bool SlabStore::give_up_dirty(uint32_t space) {
  uint64_t left = control_.believable(control_.header().dirty.count);
  for (uint32_t at = control_.header().dirty.oldest; at != kNone; at = control_.slot(at).prev) {
    if (left-- == 0) throw ControlDamaged("a list leads in a circle");
    if (control_.slot(at).children != 0) continue;
    if (space != kNone && control_.slot(at).space != space) continue;
    delist(at);
    ++control_.header().lost;
    policy_->restore(control_.kind_of(at), at);
    return true;
  }
  return false;
}

void SlabStore::join_parent(const Key& key, Tag parent, Index::Write& changes) {
  if (parent == 0) return;
  const auto found = changes.find_tag(key.space(), parent);
  const uint32_t number = found ? slot_of(found->second) : kNone;
  if (number == kNone) {
    changes.set_orphans(key.space(), parent, changes.orphans(key.space(), parent) + 1);
    return;
  }
  Slot& slot = control_.slot(number);
  ++slot.children;
  if (slot.queue == Queue::Small || slot.queue == Queue::Main) delist(number);
}

// last_used: the tick of the page that leaves. The slot of its parent, if that may go now.
uint32_t SlabStore::leave_parent(const Key& key, Tag parent, uint32_t last_used,
                                 Index::Write& changes) {
  if (parent == 0) return kNone;
  const auto found = changes.find_tag(key.space(), parent);
  const uint32_t number = found ? slot_of(found->second) : kNone;
  if (number == kNone) {
    const uint32_t orphans = changes.orphans(key.space(), parent);
    changes.set_orphans(key.space(), parent, orphans == 0 ? 0 : orphans - 1);
    return kNone;
  }
  Slot& slot = control_.slot(number);
  if (slot.children == 0 || --slot.children != 0) return kNone;
  // Each use of the page that left was one of its parent. They have had their chance; only a later
  // one counts, or a dead chain would take a round of the policy for each of its pages.
  if (static_cast<int32_t>(slot.tick - last_used) <= 0) slot.visited = 0;
  if (!may_give_way(slot)) return kNone;
  policy_->restore(control_.kind_of(number), number);
  return number;
}

std::vector<SlabStore::Job> SlabStore::publish(std::span<const Job> written, const Batch& batch,
                                               std::span<const Transfer> transfers,
                                               std::span<const Tag> parents, Spill spill,
                                               uint32_t now, Deadline deadline) {
  if (step(Step::Publish, 0, written.size()) != 0) throw Failure(Reason::Io, "injected");
  return patiently(deadline, [&] {
    return publish_now(written, batch, transfers, parents, spill, now, deadline);
  });
}

std::vector<SlabStore::Job> SlabStore::publish_now(std::span<const Job> written, const Batch& batch,
                                                   std::span<const Transfer> transfers,
                                                   std::span<const Tag> parents, Spill spill,
                                                   uint32_t now, Deadline deadline) {
  std::vector<Job> jobs(written.begin(), written.end());
  const Change change(*this, deadline);
  Index::Write changes(index_);
  for (size_t j = 0; j < jobs.size(); ++j) {
    const Key& key = batch.keys[jobs[j].page];
    if (!is_ours(jobs[j]))
      jobs[j].outcome = Stored::Refused;
    else if (jobs[j].outcome == Stored::Stored)
      publish_one(jobs[j], key, transfers[j], parents[jobs[j].page], changes);
    if (jobs[j].outcome == Stored::Stored && spill != Spill::Never && spill != Spill::Later)
      bring_ancestors(key, parents[jobs[j].page], spill, changes);
  }
  changes.commit();
  for (const Job& job : jobs) {
    if (job.outcome != Stored::Stored) {
      release(job, job.outcome == Stored::Failed);
      continue;
    }
    end_reservation(job.slot);
    control_.slot(job.slot).tick = now;
    go_live(job.slot, spill);
  }
  if (control_.header().dirty.count != 0) wake();
  return jobs;
}

void SlabStore::publish_one(Job& job, const Key& key, const Transfer& done, Tag parent,
                            Index::Write& changes) {
  const Found found = changes.find(key);
  if (found.kind == Found::Kind::Present) {  // another process was faster
    job.outcome = Stored::Present;
    return;
  }
  if (found.kind == Found::Kind::Damaged)
    rebuild_next_ = true;  // it had a slot, which only a walk finds
  const uint32_t waiting = changes.orphans(key.space(), key.tag());
  if (parent == key.tag() || (waiting != 0 && descends(changes, key.space(), parent, key.tag())))
    parent = 0;
  changes.put(key, {done.offset, static_cast<uint32_t>(done.bytes), job.generation, done.checksum,
                    control_.header().sequence++, parent, 0, 0});
  Slot& slot = control_.slot(job.slot);
  slot.children = waiting;
  if (waiting != 0) changes.set_orphans(key.space(), key.tag(), 0);
  join_parent(key, parent, changes);
}

// Whether a page has another one among its ancestors. Pages that name each other as parents would
// all have descendants, and none could ever go.
bool SlabStore::descends(const Index::Write& changes, std::string_view space, Tag from, Tag of) {
  for (uint64_t left = control_.header().pages + 1; from != 0 && left > 0; --left) {
    if (from == of) return true;
    const auto found = changes.find_tag(space, from);
    if (!found) return false;
    from = found->second.parent;
  }
  return false;
}

// A page is of no use below without its ancestors: those that were held back go there with it.
void SlabStore::bring_ancestors(const Key& key, Tag parent, Spill spill,
                                const Index::Write& changes) {
  while (parent != 0) {
    const auto found = changes.find_tag(key.space(), parent);
    const uint32_t number = found ? slot_of(found->second) : kNone;
    if (number == kNone) return;
    Slot& slot = control_.slot(number);
    if ((slot.flags & (spill == Spill::Now ? kUnspilled | kHeld : kHeld)) == 0) return;
    if (spill == Spill::Now)
      make_dirty(number);
    else
      admit(slot);
    parent = found->second.parent;
  }
}

// A page that was held back is from now on one that the tier below lacks.
void SlabStore::admit(Slot& slot) {
  slot.flags.fetch_or(kUnspilled);
  slot.flags.fetch_and(static_cast<uint8_t>(~kHeld));
}

// A published page takes its place in the lists.
void SlabStore::go_live(uint32_t number, Spill spill) {
  Slot& slot = control_.slot(number);
  slot.state = State::Live;
  ++control_.header().pages;
  control_.header().bytes += control_.slot_bytes(number);
  if (spill == Spill::Now) return make_dirty(number);
  if (spill != Spill::Never) slot.flags.fetch_or(spill == Spill::Later ? kHeld : kUnspilled);
  enlist(number);
}

}  // namespace lmcache
