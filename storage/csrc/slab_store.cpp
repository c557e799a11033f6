#include "slab_store.hpp"

#include <algorithm>
#include <cstring>
#include <thread>
#include <unordered_map>
#include <unordered_set>

#include "change.hpp"
#include "steps.hpp"

namespace lmcache {

namespace {

constexpr size_t kClearChunk = kIndexBatch;  // pages forgotten in one hold of the mutex
constexpr uint64_t kQuotaAtOnce = kIndexBatch * kBlock;
constexpr auto kForgottenWait = std::chrono::seconds(2);
constexpr auto kReleaseWait = std::chrono::milliseconds(200);
constexpr auto kAttachWait = std::chrono::seconds(10);
constexpr auto kGlance = std::chrono::milliseconds(1);  // LMDB has no way to wait for a reader

IndexOptions index_options(const StoreOptions& options) {
  return {options.directory + "/index", options.index_bytes, options.sync, options.alone};
}

std::unique_ptr<Medium> open_medium(const StoreOptions& options) {
  const std::string region = options.directory + "/region";
  if (options.medium == MediumKind::None) return no_medium();
  if (options.medium == MediumKind::File) return file_medium(region, options.device);
  return memory_medium(region, options.shape.region_bytes(), options.threads, options.huge_pages);
}

// What all processes must do alike is decided by the first. It trusts nothing that the last
// process, or bad luck, left in the control block.
const StoreOptions& agree(StoreOptions& options, Control& control) {
  uint8_t id[16];
  std::memcpy(id, options.id.data(), sizeof id);
  Header& header = control.header();
  if (options.alone) {
    control.format(id, static_cast<uint32_t>(options.policy));
    header.below = static_cast<uint32_t>(options.below);
    header.sync = static_cast<uint32_t>(options.sync);
    header.ready = kBroken;
    return options;
  }
  if (!control.usable(id))
    throw Failure(
        Reason::Busy,
        "another process has not finished making the store, or is of another version of this "
        "package; stop the engines of the other version first");
  options.policy = static_cast<PolicyKind>(header.policy);
  options.below = static_cast<Spill>(header.below);
  options.sync = static_cast<Sync>(header.sync);
  return options;
}

Stored stored_of(int error) { return error == ECANCELED ? Stored::Late : Stored::Failed; }
Lookup lookup_of(int error) { return error == ECANCELED ? Lookup::Late : Lookup::Failed; }

}  // namespace

SlabStore::SlabStore(const StoreOptions& options)
    : options_(options),
      control_(options.directory + "/control", options.shape),
      index_(index_options(agree(options_, control_))),
      owners_(options.directory + "/owners"),
      medium_(open_medium(options_)),
      policy_(make_policy(options_.policy, control_)) {
  const Change change(*this, Clock::now() + kAttachWait);
  if (owners_.self() != 0 && control_.owner(owners_.self()).held != 0) reclaim(owners_.self());
}

SlabStore::~SlabStore() = default;

// Whether no snapshot is left, by the deadline, that keeps the index from using its pages again.
bool SlabStore::old_readers_end(Deadline deadline) {
  for (;;) {
    std::this_thread::sleep_for(kGlance);
    index_.reap_readers();
    if (!index_.has_old_reader()) return true;
    if (Clock::now() >= deadline) return false;
  }
}

uint64_t SlabStore::slot_bytes_for(uint64_t page_bytes) const {
  const uint64_t least = whole_blocks(options_.shape.slab_bytes / options_.shape.slots_per_slab);
  return std::max(least, whole_blocks(page_bytes));
}

// Computed from the entry alone: readers must not look at tables that only the mutex guards.
uint32_t SlabStore::slot_of(const Entry& entry) const {
  const Shape& shape = options_.shape;
  const uint64_t bytes = slot_bytes_for(entry.length), within = entry.offset % shape.slab_bytes;
  const uint64_t slab = entry.offset / shape.slab_bytes;
  if (slab >= shape.slabs || within % bytes != 0 || within + bytes > shape.slab_bytes) return kNone;
  return static_cast<uint32_t>(slab * shape.slots_per_slab + within / bytes);
}

void SlabStore::touch(uint32_t number, uint32_t now) {
  Slot& slot = control_.slot(number);
  slot.tick.store(now, std::memory_order_relaxed);
  // One word for all pages and processes of a namespace: written once a batch, not once a page.
  auto& used = control_.space(slot.space).tick;
  if (used.load(std::memory_order_relaxed) != now) used.store(now, std::memory_order_relaxed);
  const uint8_t visited = slot.visited.load(std::memory_order_relaxed);
  if (visited < 3) slot.visited.store(static_cast<uint8_t>(visited + 1), std::memory_order_relaxed);
  const uint8_t flags = slot.flags.load(std::memory_order_relaxed);
  if ((flags & kAgain) == 0) slot.flags.fetch_or(flags & kOnce ? kAgain : kOnce);
}

std::vector<bool> SlabStore::exists(std::span<const Key> keys) {
  std::vector<bool> here(keys.size());
  const Index::Read snapshot(index_);
  for (size_t i = 0; i < keys.size(); ++i)
    here[i] = snapshot.find(keys[i]).kind == Found::Kind::Present;
  return here;
}

std::vector<bool> SlabStore::used_again(std::span<const Key> keys) {
  std::vector<bool> again(keys.size());
  const Index::Read snapshot(index_);
  for (size_t i = 0; i < keys.size(); ++i) {
    const Found found = snapshot.find(keys[i]);
    const uint32_t slot = found.kind == Found::Kind::Present ? slot_of(found.entry) : kNone;
    again[i] = slot != kNone && (control_.slot(slot).flags & kAgain) != 0;
  }
  return again;
}

std::vector<Lookup> SlabStore::get(const Batch& into, const Limits& limits) {
  const uint32_t now = tick();
  std::vector<uint32_t> slots;
  const auto outcome = read(into, limits, slots);
  for (const uint32_t slot : slots) touch(slot, now);
  return outcome;
}

// As `get`, but counts as no use. slots: where the pages that were read lie.
std::vector<Lookup> SlabStore::read(const Batch& into, const Limits& limits,
                                    std::vector<uint32_t>& slots) {
  std::vector<Lookup> outcome(into.keys.size(), Lookup::Miss);
  std::vector<Found> found(into.keys.size());
  std::vector<size_t> wanted(into.keys.size());
  for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = i;
  wanted = read_once(into, wanted, limits, found, outcome, slots);
  // Their slots were used again meanwhile, perhaps under other numbers, by a slab that got slots of
  // another size: the index says where they are now, if anywhere. If it says the same as before,
  // they are damaged.
  const std::vector<Found> before = found;
  const auto again = wanted;
  const auto stale = read_once(into, again, limits, found, outcome, slots);
  for (const size_t i : stale)
    outcome[i] = found[i].entry == before[i].entry ? Lookup::Corrupt : Lookup::Miss;
  return outcome;
}

// Whether there is something to read; otherwise `outcome` says what became of the page.
bool SlabStore::prepare_read(const Found& found, uint64_t bytes, Lookup& outcome) const {
  const bool here = found.kind == Found::Kind::Present;
  const bool other = here && found.entry.length != bytes;  // whole, and not what is asked for
  outcome = found.kind == Found::Kind::Absent || other ? Lookup::Miss : Lookup::Corrupt;
  return here && !other && slot_of(found.entry) != kNone;
}

// Reads the wanted pages; those that did not come whole are returned.
std::vector<size_t> SlabStore::read_once(const Batch& into, std::span<const size_t> wanted,
                                         const Limits& limits, std::vector<Found>& found,
                                         std::vector<Lookup>& outcome,
                                         std::vector<uint32_t>& slots) {
  std::vector<size_t> stale, reading;
  std::vector<Transfer> transfers;
  if (wanted.empty()) return stale;
  {
    const Index::Read snapshot(index_);
    for (const size_t i : wanted) found[i] = snapshot.find(into.keys[i]);
  }
  for (const size_t i : wanted) {
    if (!prepare_read(found[i], into.bytes[i], outcome[i])) continue;
    const Entry& entry = found[i].entry;
    if (control_.slot(slot_of(entry)).generation.load() != entry.generation) {
      stale.push_back(i);
      continue;
    }
    reading.push_back(i);
    transfers.push_back(
        {entry.offset, entry.length, into.pages[i], page_seed(into.keys[i].view())});
  }
  medium_->read(transfers, limits);
  for (size_t j = 0; j < reading.size(); ++j) {
    const size_t i = reading[j];
    const uint32_t slot = slot_of(found[i].entry);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (transfers[j].error != 0) {
      outcome[i] = lookup_of(transfers[j].error);
    } else if (control_.slot(slot).generation.load() != found[i].entry.generation ||
               transfers[j].checksum != found[i].entry.checksum) {
      stale.push_back(i);  // or damaged: the index tells
    } else {
      outcome[i] = Lookup::Hit;
      slots.push_back(slot);
    }
  }
  return stale;
}

// Reservations that end unpublished, by an exception too, are given back.
class SlabStore::Reservation {
 public:
  explicit Reservation(SlabStore& store) : store_(store) {}
  ~Reservation() {
    if (jobs.empty()) return;
    try {
      const Change change(store_, Clock::now() + kReleaseWait);
      for (const Job& job : jobs) store_.release(job);
    } catch (const std::exception&) {  // the next change of this process gives them back
      const std::lock_guard guard(store_.abandoned_lock_);
      store_.abandoned_.insert(store_.abandoned_.end(), jobs.begin(), jobs.end());
    }
  }
  std::vector<Job> jobs;

 private:
  SlabStore& store_;
};

std::vector<Stored> SlabStore::put(const Batch& batch, std::span<const uint64_t> checksums,
                                   std::span<const Tag> parents, Spill spill,
                                   const Limits& limits) {
  std::vector<Stored> outcome(batch.keys.size(), Stored::Refused);
  const uint32_t now = tick();
  Sorted sorted = sort(batch, parents, now, spill, limits.deadline, outcome);
  if (sorted.absent.empty()) return outcome;
  Reservation reservation(*this);
  const uint64_t evicted_before = control_.header().evicted;
  // Pages that come up from below are not worth waiting for: who reads them has them already.
  reserve(batch, sorted.absent, sorted.present, now, limits, spill != Spill::Never,
          reservation.jobs);
  std::vector<Transfer> transfers;
  for (const Job& job : reservation.jobs)
    transfers.push_back({offset_of(job, batch), batch.bytes[job.page], batch.pages[job.page],
                         page_seed(batch.keys[job.page].view())});
  write(transfers, checksums, limits, reservation.jobs);
  const auto jobs =
      publish(reservation.jobs, batch, transfers, parents, spill, now, limits.deadline);
  reservation.jobs.clear();
  for (const Job& job : jobs) outcome[job.page] = job.outcome;
  if (control_.header().evicted != evicted_before) find_evicted(batch, outcome);
  for (const auto& [later, first] : sorted.twins)
    outcome[later] = outcome[first] == Stored::Stored ? Stored::Present : outcome[first];
  return outcome;
}

void SlabStore::write(std::span<Transfer> transfers, std::span<const uint64_t> checksums,
                      const Limits& limits, std::span<Job> jobs) {
  medium_->write(transfers, limits);
  const bool flushes = options_.sync == Sync::Durable && !transfers.empty();
  const int flushed = flushes ? medium_->flush() : 0;
  for (size_t j = 0; j < jobs.size(); ++j) {
    const int error = transfers[j].error != 0 ? transfers[j].error : flushed;
    const bool damaged = !checksums.empty() && checksums[jobs[j].page] != transfers[j].checksum;
    jobs[j].outcome = error != 0 ? stored_of(error) : damaged ? Stored::Damaged : Stored::Stored;
  }
}

// A page may have given way to its own ancestors.
void SlabStore::find_evicted(const Batch& batch, std::vector<Stored>& outcome) {
  const Index::Read snapshot(index_);
  for (size_t i = 0; i < outcome.size(); ++i)
    if (outcome[i] == Stored::Present && snapshot.find(batch.keys[i]).kind != Found::Kind::Present)
      outcome[i] = Stored::Refused;
}

// Which pages of a batch are here, counting a use of each, and which are not.
SlabStore::Sorted SlabStore::sort(const Batch& batch, std::span<const Tag> parents, uint32_t now,
                                  Spill spill, Deadline deadline, std::vector<Stored>& outcome) {
  Sorted sorted;
  sorted.present.assign(batch.keys.size(), kNone);
  std::vector<uint32_t> unspilled;
  std::unordered_map<Key, size_t, KeyHash> seen;
  {
    const Index::Read snapshot(index_);
    for (size_t i = 0; i < batch.keys.size(); ++i) {
      const Found found = snapshot.find(batch.keys[i]);
      const uint32_t slot = found.kind == Found::Kind::Present ? slot_of(found.entry) : kNone;
      if (slot == kNone) {
        const auto [first, fresh] = seen.try_emplace(batch.keys[i], i);
        if (fresh)
          sorted.absent.push_back(i);
        else
          sorted.twins.emplace_back(i, first->second);
        touch_parent(snapshot, batch.keys[i], parents[i], now);
        continue;
      }
      sorted.present[i] = slot;
      if (found.entry.length != batch.bytes[i])
        continue;  // another page under the same key: refused
      outcome[i] = Stored::Present;
      touch(slot, sorted.absent.empty() ? now : now - 1);
      if (spill == Spill::OnEvict && (control_.slot(slot).flags & kHeld))
        admit(control_.slot(slot));
      if (control_.slot(slot).flags & (kUnspilled | kHeld)) unspilled.push_back(slot);
    }
  }
  if (!unspilled.empty() && (spill == Spill::Now || spill == Spill::OnTouch)) {
    const Change change(*this, deadline);
    for (const uint32_t slot : unspilled) make_dirty(slot);
    wake();
  }
  return sorted;
}

// So that it is not what gives way for its own child.
void SlabStore::touch_parent(const Index::Read& snapshot, const Key& key, Tag parent,
                             uint32_t now) {
  if (parent == 0) return;
  const auto found = snapshot.find_tag(key.space(), parent);
  const uint32_t slot = found ? slot_of(found->second) : kNone;
  if (slot != kNone) control_.slot(slot).tick.store(now, std::memory_order_relaxed);
}

uint64_t SlabStore::offset_of(const Job& job, const Batch& batch) const {
  const Shape& shape = options_.shape;
  return uint64_t{job.slot / shape.slots_per_slab} * shape.slab_bytes +
         uint64_t{job.slot % shape.slots_per_slab} * slot_bytes_for(batch.bytes[job.page]);
}

size_t SlabStore::remove(std::span<const Key> keys, Deadline deadline) {
  size_t removed = 0;
  for (; !keys.empty(); keys = keys.subspan(std::min(keys.size(), kIndexBatch))) {
    const auto some = keys.first(std::min(keys.size(), kIndexBatch));
    removed += patiently(deadline, [&] { return remove_some(some, deadline); });
  }
  advance(control_.header().room);
  return removed;
}

size_t SlabStore::remove_some(std::span<const Key> keys, Deadline deadline) {
  const Change change(*this, deadline);
  Index::Write changes(index_);
  size_t removed = 0;
  for (const Key& key : keys) {
    const Found found = changes.find(key);
    if (found.kind == Found::Kind::Absent) continue;
    drop(key, found, changes);
    ++removed;
  }
  changes.commit();
  return removed;
}

size_t SlabStore::clear(std::string_view space, Deadline deadline) {
  size_t removed = 0, some;
  do {
    some = patiently(deadline, [&] { return clear_some(space, deadline); });
    removed += some;
  } while (some == kClearChunk);
  advance(control_.header().room);
  wait_for_forgotten(std::min(deadline, Clock::now() + kForgottenWait));
  return removed;
}

// Until the tier below gets none of the pages any more that were removed while it did: whoever
// clears it next clears all. A device that hangs is not waited for; what it gets, `let_go` undoes.
void SlabStore::wait_for_forgotten(Deadline deadline) {
  for (;;) {
    const uint32_t seen = room_seen();
    if (control_.header().forgotten == 0 || !wait_for_room(seen, deadline)) return;
  }
}

size_t SlabStore::clear_some(std::string_view space, Deadline deadline) {
  const Change change(*this, deadline);
  Index::Write changes(index_);
  const auto pages = changes.in_space(space, kClearChunk);
  for (const auto& [key, found] : pages) drop(key, found, changes);
  changes.commit();
  return pages.size();
}

void SlabStore::pin(std::span<const Key> keys, uint32_t until, Deadline deadline) {
  patiently(deadline, [&] {
    const Change change(*this, deadline);
    Index::Write changes(index_);
    for (const Key& key : keys) {
      const Found found = changes.find(key);
      const uint32_t slot = found.kind == Found::Kind::Present ? slot_of(found.entry) : kNone;
      if (slot == kNone) continue;
      changes.set_pin(key, until);
      control_.slot(slot).pinned_until = until;
    }
    changes.commit();
  });
}

void SlabStore::set_quota(std::string_view space, uint64_t bytes, Deadline deadline) {
  uint32_t number = kNone;
  patiently(deadline, [&] {
    const Change change(*this, deadline);
    if (bytes == 0 && control_.find_space(space) == kNone) return;  // it has none
    Eviction eviction(index_);
    number = number_of_space(space, tick(), eviction);
    if (number == kNone)
      throw Failure(Reason::Full, "every namespace that the store has room for has a quota");
    eviction.changes().set_quota(space, bytes);
    eviction.commit();
    control_.space(number).quota = bytes;
  });
  while (bytes != 0 && patiently(deadline, [&] { return shrink_to_quota(number, deadline); })) {
  }
  advance(control_.header().room);
}

// Evicts some of what a namespace has beyond its quota; false when there was nothing, or nothing
// may go.
bool SlabStore::shrink_to_quota(uint32_t number, Deadline deadline) {
  const Change change(*this, deadline);
  const Space& its = control_.space(number);
  const uint64_t before = its.bytes;
  if (its.quota == 0 || before <= its.quota) return false;
  Eviction eviction(index_);
  const uint64_t some = std::min(before - its.quota, kQuotaAtOnce);
  evict_from_space(number, before - some, its.quota, tick(), eviction);
  eviction.commit();
  return its.bytes < before;
}

std::vector<Lent> SlabStore::lend(uint64_t bytes_most, Deadline deadline) {
  std::vector<Lent> lent;
  const Change change(*this, deadline);
  const Index::Read snapshot(index_);
  List& dirty = control_.header().dirty;
  for (uint64_t bytes = 0; dirty.oldest != kNone;) {
    const uint32_t slot = dirty.oldest;
    const Key key = control_.key_of(slot);
    const Found found = snapshot.find(key);
    if (found.kind != Found::Kind::Present)
      throw ControlDamaged("a dirty page is not in the index");
    const Entry& entry = found.entry;
    if (!lent.empty() && (bytes + entry.length > bytes_most || lent.size() == kIndexBatch)) break;
    bytes += entry.length;
    delist(slot);
    hold(slot, kSpilling);
    auto* data = const_cast<uint8_t*>(medium_->address(entry.offset));
    lent.push_back(
        {key, slot, entry.generation, {data, entry.length}, entry.checksum, entry.parent, false});
  }
  return lent;
}

// From the policy's point of view a page that is being written below is held by its writer.
void SlabStore::hold(uint32_t number, uint8_t flags) {
  Slot& slot = control_.slot(number);
  slot.owner = owners_.self();
  slot.flags.fetch_or(flags);
  ++control_.owner(owners_.self()).held;
  if ((flags & kShown) == 0) control_.header().spilling_bytes += control_.slot_bytes(number);
}

void SlabStore::unhold(uint32_t number) {
  Slot& slot = control_.slot(number);
  --control_.owner(slot.owner).held;
  slot.owner = 0;
  const uint8_t was = slot.flags.fetch_and(static_cast<uint8_t>(~(kSpilling | kShown | kAsked)));
  if (was & kAsked) --control_.header().asked;
  if (was & kShown) return;
  control_.header().spilling_bytes -= control_.slot_bytes(number);
  if (slot.state == State::Reserved) --control_.header().forgotten;
}

bool Shown::holds(const uint8_t* at, uint64_t bytes) const {
  return std::any_of(pages.begin(), pages.end(), [&](const Lent& page) {
    return at == page.page.address && bytes == page.page.bytes;
  });
}

std::shared_ptr<Shown> SlabStore::show(std::span<const Key> keys, std::span<const uint64_t> bytes,
                                       Deadline deadline) {
  auto shown = std::make_shared<Shown>();
  if (medium_->address(0) == nullptr) return shown;
  shown->medium = medium_;
  shown->pages.reserve(keys.size());  // not once slots are held: it may fail
  shown->places.reserve(keys.size());
  const Change change(*this, deadline);
  const Index::Read snapshot(index_);
  const uint32_t now = tick();
  try {
    for (size_t i = 0; i < keys.size(); ++i) {
      const Found found = snapshot.find(keys[i]);
      if (!may_be_shown(found, bytes[i])) continue;
      shown->pages.push_back(show_one(keys[i], found.entry, now));
      shown->places.push_back(i);
    }
  } catch (...) {  // nobody gets those: the next change of this process takes them back
    leave_to_next_change(shown->pages, Stored::Present);
    throw;
  }
  return shown;
}

Lent SlabStore::show_one(const Key& key, const Entry& entry, uint32_t now) {
  const uint32_t slot = slot_of(entry);
  delist(slot);
  hold(slot, kSpilling | kShown);
  touch(slot, now);
  auto* data = const_cast<uint8_t*>(medium_->address(entry.offset));
  return {key, slot, entry.generation, {data, entry.length}, entry.checksum, entry.parent, true};
}

void SlabStore::leave_to_next_change(std::span<const Lent> pages, Stored outcome) {
  const std::lock_guard guard(abandoned_lock_);
  for (const Lent& page : pages) unsettled_.emplace_back(page, outcome);
}

bool SlabStore::may_be_shown(const Found& found, uint64_t bytes) {
  const bool here = found.kind == Found::Kind::Present && found.entry.length == bytes;
  const uint32_t number = here ? slot_of(found.entry) : kNone;
  if (number == kNone) return false;
  const Slot& slot = control_.slot(number);
  return slot.state == State::Live && slot.generation == found.entry.generation &&
         slot.queue != Queue::Dirty && (slot.flags & kSpilling) == 0;
}

void SlabStore::unshow(const Shown& shown, Deadline deadline) {
  if (shown.pages.empty()) return;
  try {
    const Change change(*this, deadline);
    for (const Lent& page : shown.pages) unshow_one(page);
  } catch (const Failure&) {
    leave_to_next_change(shown.pages, Stored::Present);
    throw;
  }
  advance(control_.header().room);
}

void SlabStore::unshow_one(const Lent& page) {
  if (is_lent(page)) take_back(page.slot);
}

// A slot that was shown is as any other again.
void SlabStore::take_back(uint32_t number) {
  Slot& slot = control_.slot(number);
  const bool asked = (slot.flags & kAsked) != 0;
  unhold(number);
  if (slot.state == State::Reserved) return free_slot(number);
  if (!asked) return enlist(number);
  make_dirty(number);
  wake();
}

// Whether it is in this process's hands still; all may have been made anew meanwhile.
bool SlabStore::is_lent(const Lent& page) {
  const Slot& slot = control_.slot(page.slot);
  return slot.owner == owners_.self() && slot.generation == page.generation &&
         (slot.flags & kSpilling) != 0 && ((slot.flags & kShown) != 0) == page.shown &&
         control_.is_of_its_slab(page.slot);
}

std::vector<Key> SlabStore::settle(std::span<const Lent> pages, std::span<const Stored> outcome,
                                   Deadline deadline) {
  std::vector<Key> gone;
  try {
    const Change change(*this, deadline);
    for (size_t i = 0; i < pages.size(); ++i)
      if (!settle_one(pages[i], outcome[i])) gone.push_back(pages[i].key);
    gone.insert(gone.end(), gone_.begin(), gone_.end());
    gone_.clear();
  } catch (const Failure&) {  // the next change of this process settles them
    const std::lock_guard guard(abandoned_lock_);
    for (size_t i = 0; i < pages.size(); ++i) unsettled_.emplace_back(pages[i], outcome[i]);
    throw;
  }
  advance(control_.header().room);
  return gone;
}

// Who read one of them in the tier below, before that forgot it, may have brought it up again.
void SlabStore::let_go(std::span<const Lent> pages, std::span<const Key> gone, bool below_too,
                       Deadline deadline) {
  try {
    const Change change(*this, deadline);
    for (const Lent& page : pages) let_go_one(page);
    if (!below_too) gone_.insert(gone_.end(), gone.begin(), gone.end());
    const Index::Read snapshot(index_);
    for (const Key& key : gone) {
      const Found found = snapshot.find(key);
      const uint32_t slot = found.kind == Found::Kind::Present ? slot_of(found.entry) : kNone;
      if (below_too && slot != kNone) make_dirty(slot);
    }
  } catch (const Failure&) {  // the next change of this process does, and tells again
    const std::unordered_set<Key, KeyHash> those(gone.begin(), gone.end());
    for (const Lent& page : pages)
      if (those.contains(page.key)) leave_to_next_change({&page, 1}, Stored::Present);
    throw;
  }
  advance(control_.header().room);
}

void SlabStore::let_go_one(const Lent& page) {
  if (!is_lent(page) || control_.slot(page.slot).state != State::Reserved) return;
  unhold(page.slot);
  free_slot(page.slot);
}

// False when the page was forgotten while it was being written: then its slot is held until
// `let_go`.
bool SlabStore::settle_one(const Lent& page, Stored outcome) {
  if (!is_lent(page)) return is_here(page);
  Slot& slot = control_.slot(page.slot);
  if (page.shown) {
    take_back(page.slot);
    return true;
  }
  if (slot.state == State::Reserved) return false;
  unhold(page.slot);
  if (outcome == Stored::Late) {
    control_.push_oldest(control_.header().dirty, page.slot, Queue::Dirty);
    control_.header().dirty_bytes += control_.slot_bytes(page.slot);
    return true;
  }
  // Refused, a page that is to go goes without: asking again would only keep those waiting that
  // need its room.
  const bool given_up = outcome == Stored::Refused && options_.below == Spill::OnEvict;
  if (given_up) ++control_.header().lost;
  if (outcome == Stored::Failed || (outcome == Stored::Refused && !given_up))
    slot.flags.fetch_or(kUnspilled);
  // Written back because it was to go, it goes first.
  if (options_.below == Spill::OnEvict && may_give_way(slot))
    policy_->restore(control_.kind_of(page.slot), page.slot);
  else
    enlist(page.slot);
  return true;
}

bool SlabStore::is_here(const Lent& page) {
  const Found found = Index::Read(index_).find(page.key);
  return found.kind == Found::Kind::Present && found.entry.generation == page.generation;
}

size_t SlabStore::queue_unspilled(bool touched_only, uint64_t bytes_most, Deadline deadline) {
  const Change change(*this, deadline);
  const uint8_t wanted = touched_only ? kUnspilled | kOnce : kUnspilled;
  size_t queued = 0;
  for_each_slot([&](uint32_t number, Slot& slot) {
    if (slot.state != State::Live || (slot.flags & wanted) != wanted || bytes_most == 0) return;
    if ((slot.flags & kSpilling) && !(slot.flags & kShown)) return;
    bytes_most -= std::min(bytes_most, control_.slot_bytes(number));
    make_dirty(number);
    ++queued;
  });
  if (queued != 0) wake();
  return queued;
}

bool SlabStore::wait_for_work(uint32_t seen, Deadline deadline) {
  return wait_while(control_.header().work, seen, deadline);
}

size_t SlabStore::sweep(Deadline deadline) {
  index_.reap_readers();
  size_t freed = 0;
  const Change change(*this, deadline);
  for (uint16_t owner = 1; owner < kOwners; ++owner)
    if (control_.owner(owner).held != 0 && !owners_.alive(owner)) freed += reclaim(owner);
  if (freed != 0) advance(control_.header().room);
  return freed;
}

Counts SlabStore::counts() {
  const Header& header = control_.header();
  uint64_t held = 0;
  for (uint32_t owner = 1; owner < kOwners; ++owner) held += control_.owner(owner).held;
  return {header.pages,
          header.bytes,
          header.reserved,
          header.reserved_bytes,
          header.evicted,
          header.dirty.count,
          header.dirty_bytes,
          header.spilling_bytes,
          header.asked,
          header.lost,
          held,
          index_.used_bytes(),
          index_.tree_bytes()};
}

}  // namespace lmcache
