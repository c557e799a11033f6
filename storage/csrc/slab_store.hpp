// A store of pages on one medium: an index of what there is (index.hpp), a region of slots where it
// lies (medium.hpp), and what processes share besides (control.hpp).
//
//   put   reserve slots -> write the data -> flush -> publish in the index
//   get   look up -> copy -> the slot's generation is still the same, and the checksum holds
//
// Slots are reserved and published under the shared mutex; data moves under none. A slot is used
// again only after the removal of its page is committed, and has another generation from then on.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "control.hpp"
#include "index.hpp"
#include "medium.hpp"
#include "owners.hpp"
#include "policy.hpp"

namespace lmcache {

// The values are those of Python's side (slab/tier.py).
enum class Lookup : uint8_t { Hit, Miss, Corrupt, Failed, Late };
enum class Stored : uint8_t { Stored, Present, Refused, Failed, Late, Damaged };

// What the tier below is to get of the pages of a put.
enum class Spill : uint8_t {
  Never,    // it has them, or there is none
  Now,      // write-through
  OnEvict,  // write-back: when they would go from here
  OnTouch,  // once they are used, or put again
  Later,    // with the first of their descendants that is written
};

enum class MediumKind { File, Memory, None };

struct StoreOptions {
  std::string directory;  // holds index, region, control and owners
  MediumKind medium = MediumKind::File;
  bool alone = false;  // this process has the store to itself while it opens it
  Shape shape{};
  uint64_t index_bytes = 0;
  uint64_t pages_most = 0;  // that the index has room for
  Sync sync = Sync::Durable;
  PolicyKind policy = PolicyKind::Sieve;
  Spill below = Spill::Never;  // what the tier below is to get, of pages of which no more is known
  unsigned threads = 2;
  bool huge_pages = false;
  DeviceOptions device{};
  std::array<uint8_t, 16> id{};
};

struct Batch {
  std::span<const Key> keys;
  std::span<const std::span<const Segment>> pages;
  std::span<const uint64_t> bytes;  // of each page
};

struct Counts {
  uint64_t pages, bytes;              // live
  uint64_t reserved, reserved_bytes;  // slots that are being written
  uint64_t evicted;
  uint64_t dirty_pages, dirty_bytes;  // that wait to be written below
  uint64_t spilling_bytes;            // that are being written below
  uint64_t asked;                     // pages that are shown, and go below after that
  uint64_t lost;                      // given up for room before they were written below
  uint64_t held;  // slots that some process has in hand: reserved, spilled, shown
  uint64_t index_bytes, tree_bytes;
};

struct Check {
  uint64_t pages = 0;
  std::vector<Key> corrupt;
  std::vector<std::string> problems;
};

// A page that is being written to the tier below, or shown, in place.
struct Lent {
  Key key;
  uint32_t slot;
  uint32_t generation;
  Segment page;
  uint64_t checksum;
  Tag parent;
  bool shown;  // or written below: a slot may have come from one to the other meanwhile
};

// Pages that stay where they are for as long as somebody reads them there (`SlabStore::show`).
struct Shown : std::enable_shared_from_this<Shown> {
  std::vector<Lent> pages;
  std::vector<size_t> places;      // of each, its place among those that were asked for
  std::shared_ptr<Medium> medium;  // keeps the memory mapped
  bool holds(const uint8_t* at, uint64_t bytes) const;
};

class SlabStore {
 public:
  explicit SlabStore(const StoreOptions& options);
  ~SlabStore();
  SlabStore(const SlabStore&) = delete;
  SlabStore& operator=(const SlabStore&) = delete;

  std::vector<bool> exists(std::span<const Key> keys);
  std::vector<Lookup> get(const Batch& into, const Limits& limits);
  // checksums: empty, or of each page as an upper tier knows it. parents: of each page.
  std::vector<Stored> put(const Batch& batch, std::span<const uint64_t> checksums,
                          std::span<const Tag> parents, Spill spill, const Limits& limits);
  size_t remove(std::span<const Key> keys, Deadline deadline);
  size_t clear(std::string_view space, Deadline deadline);

  void pin(std::span<const Key> keys, uint32_t until, Deadline deadline);
  void set_quota(std::string_view space, uint64_t bytes, Deadline deadline);
  // Whether each page was read before, beyond the last time.
  std::vector<bool> used_again(std::span<const Key> keys);

  std::vector<Lent> lend(uint64_t bytes_most, Deadline deadline);
  // Those of the pages that were forgotten meanwhile: the tier below must forget them too, and then
  // they are let go. Pages that are here once more are queued for it again.
  std::vector<Key> settle(std::span<const Lent> pages, std::span<const Stored> outcome,
                          Deadline deadline);
  void let_go(std::span<const Lent> pages, std::span<const Key> gone, bool below_too,
              Deadline deadline);
  // Those of the pages that are here, of these lengths, and that nobody has in hand; where slots
  // can be read in place. It counts as a use of them. Until `unshow` they are not evicted; removed,
  // they keep their bytes. Nobody has verified them.
  std::shared_ptr<Shown> show(std::span<const Key> keys, std::span<const uint64_t> bytes,
                              Deadline deadline);
  void unshow(const Shown& shown, Deadline deadline);
  size_t queue_unspilled(bool touched_only, uint64_t bytes_most, Deadline deadline);
  uint32_t work_seen() { return control_.header().work.load(); }
  bool wait_for_work(uint32_t seen, Deadline deadline);
  void wake() { advance(control_.header().work); }
  uint32_t room_seen() { return control_.header().room.load(); }
  bool wait_for_room(uint32_t seen, Deadline deadline) {
    return wait_while(control_.header().room, seen, deadline);
  }

  size_t sweep(Deadline deadline);  // frees what dead processes held; how many slots
  Counts counts();
  Check check(bool repair, const Limits& limits);
  uint64_t damaged_at_open() const { return damaged_at_open_; }
  std::string describe() const { return medium_->describe(); }
  std::string pin_memory(const std::string& driver) { return medium_->pin(driver); }
  Medium& medium() { return *medium_; }
  uint64_t slot_bytes_for(uint64_t page_bytes) const;
  const Shape& shape() const { return options_.shape; }
  // Policy, below and sync as the first of the store's processes was told.
  const StoreOptions& options() const { return options_; }

 private:
  friend class Holdings;
  friend class Rebuild;
  friend class Inspection;
  struct Job {
    size_t page;  // of the batch
    uint32_t slot;
    uint32_t generation;
    Stored outcome = Stored::Refused;
  };
  struct Sorted {
    std::vector<size_t> absent;                    // each key once
    std::vector<uint32_t> present;                 // the slot of each page; kNone: not here
    std::vector<std::pair<size_t, size_t>> twins;  // a later place of an absent key, and the first
  };
  class Change;
  class Eviction;
  class Reservation;
  // Slots, by the parent that they name: of one namespace, as others have pages of the same hash.
  using Kin = std::multimap<std::pair<uint16_t, Tag>, uint32_t>;

  uint32_t slot_of(const Entry& entry) const;
  uint32_t tick() { return control_.header().clock.fetch_add(1) + 1; }
  void touch(uint32_t slot, uint32_t now);

  bool prepare_read(const Found& found, uint64_t bytes, Lookup& outcome) const;
  std::vector<size_t> read_once(const Batch& into, std::span<const size_t> wanted,
                                const Limits& limits, std::vector<Found>& found,
                                std::vector<Lookup>& outcome, std::vector<uint32_t>& slots);
  std::vector<Lookup> read(const Batch& into, const Limits& limits, std::vector<uint32_t>& slots);

  Sorted sort(const Batch& batch, std::span<const Tag> parents, uint32_t now, Spill spill,
              Deadline deadline, std::vector<Stored>& outcome);
  void find_evicted(const Batch& batch, std::vector<Stored>& outcome);
  void touch_parent(const Index::Read& snapshot, const Key& key, Tag parent, uint32_t now);
  uint64_t offset_of(const Job& job, const Batch& batch) const;
  void write(std::span<Transfer> transfers, std::span<const uint64_t> checksums,
             const Limits& limits, std::span<Job> jobs);
  void reserve(const Batch& batch, std::span<const size_t> wanted,
               std::span<const uint32_t> present, uint32_t now, const Limits& limits, bool patient,
               std::vector<Job>& jobs);
  std::vector<Job> publish(std::span<const Job> written, const Batch& batch,
                           std::span<const Transfer> transfers, std::span<const Tag> parents,
                           Spill spill, uint32_t now, Deadline deadline);
  std::vector<Job> publish_now(std::span<const Job> written, const Batch& batch,
                               std::span<const Transfer> transfers, std::span<const Tag> parents,
                               Spill spill, uint32_t now, Deadline deadline);
  template <class Work>
  auto patiently(Deadline deadline, const Work& work);
  bool old_readers_end(Deadline deadline);
  size_t remove_some(std::span<const Key> keys, Deadline deadline);
  size_t clear_some(std::string_view space, Deadline deadline);
  void check_pages(Check& report, const Limits& limits);
  void check_some(std::span<const Key> keys, std::span<const uint64_t> bytes, uint64_t total,
                  Check& report, const Limits& limits);

  // All that follows is called under the mutex, within a Change.
  void ensure_whole();
  void settle_left_over();
  void rebuild();
  size_t reserve_some(const Batch& batch, std::span<const size_t> wanted,
                      std::span<const uint32_t> present, uint32_t now, bool force,
                      std::vector<Job>& jobs);
  uint32_t number_of_space(std::string_view name, uint32_t now, Eviction& eviction);
  uint32_t oldest_space(uint32_t now);
  void forget_space(uint32_t number, Eviction& eviction);
  uint32_t take_slot(uint64_t page_bytes, uint32_t space, uint32_t now, bool force,
                     Eviction& eviction);
  uint32_t kind_for(uint64_t slot_bytes);
  bool make_room(uint32_t kind, uint32_t now, Eviction& eviction);
  bool carve(uint32_t kind);
  void empty(uint32_t slab);
  void assign(uint32_t slab, uint32_t kind);
  uint32_t rival_of(uint32_t kind, uint32_t now);
  bool steal(uint32_t kind, uint32_t from, uint32_t now, Eviction& eviction);
  std::optional<std::vector<uint32_t>> doomed_with(uint32_t slab, uint32_t now,
                                                   std::optional<Kin>& kin, Eviction& eviction);
  Kin kin_of_all(Eviction& eviction);
  bool add_descendants(std::vector<uint32_t>& doomed, uint32_t now, const Kin& kin);
  bool must_stay(const Slot& slot, uint32_t now) const;
  bool evict_one(uint32_t kind, uint32_t now, Eviction& eviction);
  uint64_t queued_at_once() const;
  void queue_slab(uint32_t slab);
  bool evict_any(uint32_t now, Eviction& eviction);
  bool evict_from_space(uint32_t space, uint64_t most, uint64_t page_bytes, uint32_t now,
                        Eviction& eviction);
  void thin_out(uint32_t space, uint64_t wanted, uint32_t now, Eviction& eviction);
  uint64_t let_go(uint32_t slot, uint64_t wanted, uint32_t now, Eviction& eviction);
  uint32_t evict(uint32_t slot, Eviction& eviction);
  void evict_leaves_first(std::vector<uint32_t> slots, Eviction& eviction);
  uint32_t drop(const Key& key, const Found& found, Index::Write& changes);
  void count_out(uint32_t slot);

  void reserve_slot(uint32_t slot, uint32_t space, const Key& key);
  void count_reserved(uint32_t slot);
  bool is_ours(const Job& job);
  void release(const Job& job, bool suspect = false);
  void end_reservation(uint32_t slot);
  void free_slot(uint32_t slot, bool suspect = false);
  size_t reclaim(uint16_t owner);
  bool may_be_shown(const Found& found, uint64_t bytes);
  bool is_lent(const Lent& page);
  Lent show_one(const Key& key, const Entry& entry, uint32_t now);
  void leave_to_next_change(std::span<const Lent> pages, Stored outcome);
  void settle_late(const Lent& page, Stored outcome);
  void unshow_one(const Lent& page);
  void let_go_one(const Lent& page);
  void wait_for_forgotten(Deadline deadline);
  void take_back(uint32_t slot);
  void hold(uint32_t slot, uint8_t flags);
  void unhold(uint32_t slot);

  void enlist(uint32_t slot);  // among those that may give way, if it may
  void delist(uint32_t slot);  // out of whichever list it is in
  bool may_give_way(const Slot& slot) const;
  void make_dirty(uint32_t slot);
  bool give_up_dirty(uint32_t space);
  bool settle_one(const Lent& page, Stored outcome);
  bool is_here(const Lent& page);
  bool shrink_to_quota(uint32_t space, Deadline deadline);
  void join_parent(const Key& key, Tag parent, Index::Write& changes);
  uint32_t leave_parent(const Key& key, Tag parent, uint32_t last_used, Index::Write& changes);
  bool descends(const Index::Write& changes, std::string_view space, Tag from, Tag of);
  void publish_one(Job& job, const Key& key, const Transfer& done, Tag parent,
                   Index::Write& changes);
  void bring_ancestors(const Key& key, Tag parent, Spill spill, const Index::Write& changes);
  static void admit(Slot& slot);
  void go_live(uint32_t slot, Spill spill);

  template <class Visit>
  void for_each_slot(const Visit& visit) {
    for (uint32_t number = 0; number < options_.shape.slabs; ++number) {
      const Slab& slab = control_.slab(number);
      if (slab.kind == kNone || slab.live == 0) continue;
      const uint32_t first = number * options_.shape.slots_per_slab;
      const uint32_t slots = control_.kind(slab.kind).slots;
      for (uint32_t i = 0; i < slots; ++i) visit(first + i, control_.slot(first + i));
    }
  }

  StoreOptions options_;
  Control control_;
  Index index_;
  Owners owners_;
  std::shared_ptr<Medium> medium_;
  std::unique_ptr<Policy> policy_;
  uint64_t damaged_at_open_ = 0;
  bool rebuild_next_ = false;                // under the mutex
  std::atomic<uint32_t> stalled_at_{kNone};  // value of `room` when a wait for it was in vain
  std::mutex abandoned_lock_;
  std::vector<Key> gone_;  // of pages lent that were forgotten meanwhile; told to who settles next
  std::vector<std::pair<Lent, Stored>> unsettled_;  // pages lent, whose return had no lock in time
  std::vector<Job> abandoned_;  // reservations whose release had no lock in time
};

}  // namespace lmcache
