// `check`: an fsck of a store.
#include "inspection.hpp"

#include <algorithm>

#include "change.hpp"

namespace lmcache {

namespace {

constexpr size_t kProblemsMost = 100;  // named; more would only fill a log
constexpr uint64_t kReadAtOnce = 32 << 20;
constexpr size_t kPagesAtOnce = 256;

}  // namespace

void Inspection::problem(const std::string& text) {
  if (report_.problems.size() < kProblemsMost) report_.problems.push_back(text);
}

void Inspection::run() {
  const Index::Read snapshot(store_.index_);
  snapshot.walk(nullptr, SIZE_MAX,
                [&](const Key& key, const Found& found) { look_at(snapshot, key, found); });
  look_at_slots();
  for (uint32_t number = 0; number < kClasses; ++number) look_at_class(number);
  count_list(control_.header().dirty, Queue::Dirty, "pages to be written below");
  look_at_totals();
}

void Inspection::look_at(const Index::Read& snapshot, const Key& key, const Found& found) {
  ++entries_;
  const uint32_t number = found.kind == Found::Kind::Present ? store_.slot_of(found.entry) : kNone;
  if (number == kNone) {
    report_.corrupt.push_back(key);
    return;
  }
  const uint32_t slab = control_.slab(control_.slab_of(number)).kind;
  const uint64_t bytes = store_.slot_bytes_for(found.entry.length);
  const Slot& slot = control_.slot(number);
  if (slab == kNone || control_.kind(slab).slot_blocks * kBlock != bytes)
    return problem("a page lies in a slab of another size");
  if (slot.state != State::Live || control_.key_of(number) != key)
    return problem("a page's slot is not its own");
  if (slot.generation != found.entry.generation) problem("a page's slot has another generation");
  if (found.entry.parent == 0) return;
  const auto parent = snapshot.find_tag(key.space(), found.entry.parent);
  if (parent) ++children_[store_.slot_of(parent->second)];
}

void Inspection::look_at_slots() {
  store_.for_each_slot([this](uint32_t number, const Slot& slot) {
    count(slot, control_.slot_bytes(number));
    if (slot.state == State::Reserved) {
      if (!store_.owners_.alive(slot.owner)) problem("a slot is held by a process that is gone");
    }
    if (slot.state != State::Live) return;
    const auto count = children_.find(number);
    if (slot.children != (count == children_.end() ? 0 : count->second))
      problem("a page counts " + std::to_string(slot.children) +
              " descendants next to it, and has others");
    const bool lined_up = slot.queue == Queue::Small || slot.queue == Queue::Main;
    const bool should =
        slot.children == 0 && slot.queue != Queue::Dirty && !(slot.flags & kSpilling);
    if (lined_up != should)
      problem("a page that may give way is in no list, or the other way round");
  });
}

// What the header, the namespaces and the owners have counted as well.
void Inspection::count(const Slot& slot, uint64_t bytes) {
  if (slot.state == State::Free) return;
  const bool live = slot.state == State::Live, spilling = (slot.flags & kSpilling) != 0;
  const bool reserved = !live && !spilling;  // forgotten while it is spilled, a page is neither
  live_ += live;
  bytes_ += live ? bytes : 0;
  reserved_ += reserved;
  reserved_bytes_ += reserved ? bytes : 0;
  const bool goes_below = spilling && !(slot.flags & kShown);
  spilling_bytes_ += goes_below ? bytes : 0;
  forgotten_ += goes_below && !live;
  asked_ += (slot.flags & kAsked) != 0;
  dirty_bytes_ += slot.queue == Queue::Dirty ? bytes : 0;
  if (slot.space < kSpaces) {
    ++pages_in_[slot.space];
    bytes_in_[slot.space] += bytes;
  }
  if ((reserved || spilling) && slot.owner < kOwners) ++held_[slot.owner];
}

void Inspection::look_at_class(uint32_t number) {
  const Class& kind = control_.kind(number);
  if (kind.slabs == 0) return;
  const std::string name = "class of " + std::to_string(kind.slot_blocks * kBlock) + " bytes";
  uint64_t slots = 0, live = 0;
  for (uint32_t slab = 0; slab < control_.shape().slabs; ++slab) {
    if (control_.slab(slab).kind != number) continue;
    slots += kind.slots;
    live += control_.slab(slab).live;
  }
  if (slots != live + kind.free.count) problem(name + ": slots are neither free nor in use");
  if (slots != uint64_t{kind.slabs} * kind.slots) problem(name + ": another number of slabs");
  count_list(kind.free, Queue::Free, name + ", free");
  count_list(kind.small, Queue::Small, name + ", tried out");
  count_list(kind.main, Queue::Main, name + ", in use");
}

void Inspection::count_list(const List& list, Queue queue, const std::string& name) {
  uint64_t count = 0;
  for (uint32_t at = list.newest; at != kNone && count <= control_.believable(list.count);
       at = control_.slot(at).next) {
    ++count;
    if (control_.slot(at).queue != queue) problem(name + ": holds a slot of another list");
  }
  if (count != list.count) problem(name + ": counts other than it holds");
}

void Inspection::look_at_totals() {
  const Header& header = control_.header();
  if (live_ != header.pages || bytes_ != header.bytes)
    problem("the totals are not those of the slots");
  if (live_ + report_.corrupt.size() < entries_)
    problem("the index names pages that no slot holds");
  if (live_ > entries_) problem("slots hold pages that the index does not name");
  if (reserved_ != header.reserved || reserved_bytes_ != header.reserved_bytes)
    problem("other slots are reserved than counted");
  if (dirty_bytes_ != header.dirty_bytes || spilling_bytes_ != header.spilling_bytes ||
      forgotten_ != header.forgotten || asked_ != header.asked)
    problem("what goes below is other than counted");
  for (uint32_t i = 0; i < kSpaces; ++i)
    if (const Space& it = control_.space(i); pages_in_[i] != it.pages || bytes_in_[i] != it.bytes)
      problem("a namespace counts other pages than it has");
  for (uint32_t i = 1; i < kOwners; ++i)
    if (held_[i] != control_.owner(i).held) problem("a process counts other slots than it holds");
}

Check SlabStore::check(bool repair, const Limits& limits) {
  Check report;
  {
    const Change change(*this, limits.deadline);
    try {
      Inspection(*this, report).run();
    } catch (const ControlDamaged& damage) {
      report.problems.emplace_back(damage.what());
      rebuild_next_ = true;
    }
    rebuild_next_ = rebuild_next_ || (repair && !report.problems.empty());
  }
  check_pages(report, limits);
  std::sort(report.corrupt.begin(), report.corrupt.end(),
            [](const Key& a, const Key& b) { return a.bytes < b.bytes; });
  if (repair && !report.corrupt.empty()) remove(report.corrupt, limits.deadline);
  return report;
}

// Reads every page, a few at a time, without the mutex: pages may come and go meanwhile.
void SlabStore::check_pages(Check& report, const Limits& limits) {
  std::optional<Key> last;
  for (;;) {
    std::vector<Key> keys;
    std::vector<uint64_t> bytes;
    uint64_t total = 0;
    size_t seen;
    {
      const Index::Read snapshot(index_);
      seen = snapshot.walk(
          last ? &*last : nullptr, kPagesAtOnce, [&](const Key& key, const Found& found) {
            if (total > kReadAtOnce) return;
            last = key;
            if (found.kind != Found::Kind::Present || slot_of(found.entry) == kNone) return;
            keys.push_back(key);
            bytes.push_back(found.entry.length);
            total += found.entry.length;
          });
    }
    if (seen == 0) return;
    check_some(keys, bytes, total, report, limits);
  }
}

void SlabStore::check_some(std::span<const Key> keys, std::span<const uint64_t> bytes,
                           uint64_t total, Check& report, const Limits& limits) {
  std::vector<uint8_t> buffer(total);
  std::vector<Segment> segments;
  std::vector<std::span<const Segment>> pages;
  uint8_t* at = buffer.data();
  for (const uint64_t length : bytes) {
    segments.push_back({at, length});
    at += length;
  }
  for (const Segment& segment : segments) pages.emplace_back(&segment, 1);
  std::vector<uint32_t> slots;
  const auto outcome = read({keys, pages, bytes}, limits, slots);
  for (size_t i = 0; i < keys.size(); ++i) {
    report.pages += outcome[i] == Lookup::Hit;
    if (outcome[i] == Lookup::Corrupt) report.corrupt.push_back(keys[i]);
    if (outcome[i] == Lookup::Failed) report.problems.push_back("a page could not be read");
    if (outcome[i] == Lookup::Late)
      throw Failure(Reason::Busy, "the check did not come to an end before its deadline");
  }
}

}  // namespace lmcache
