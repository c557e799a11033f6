#pragma once

#include <unordered_map>
#include <unordered_set>

#include "slab_store.hpp"

namespace lmcache {

// One making anew. Under the mutex.
class Rebuild {
 public:
  explicit Rebuild(SlabStore& store) : store_(store), control_(store.control_) {}
  void run();

 private:
  using Slots = std::unordered_set<uint32_t>;
  struct Placed {
    uint64_t sequence;
    uint32_t slot;
    Tag parent;
  };

  void remember_what_is_held();
  bool is_sound(uint32_t kind) const;
  bool is_held(const Slot& slot) const;
  bool is_shown(const Slot& slot) const;
  void look_for_conflict(const Entry& entry);
  void clear_all_but_held();
  void clear_slots(uint32_t slab, const Slots& held);
  void place(const Key& key, const Found& found);
  void show_again(uint32_t slot);
  bool take(uint32_t slot, uint64_t slot_bytes);
  void occupy(uint32_t slot, const Key& key, State state);
  void count_child(const Index::Read& snapshot, const Placed& page);
  void read_pins_and_quotas(const Index::Read& snapshot);
  void fill_free_lists();
  void line_up();
  void look_for_leftovers(const Index::Read& snapshot);
  void mend_index();

  SlabStore& store_;
  Control& control_;
  std::unordered_map<uint32_t, Slots> held_;      // by processes that live, and no page's; by slab
  std::unordered_map<uint32_t, uint16_t> shown_;  // by whom, of a slot
  std::vector<Placed> placed_;
  std::vector<Key> bad_;
  std::unordered_map<std::string, uint32_t> orphans_;  // by their parent, as the index names it
};

}  // namespace lmcache
