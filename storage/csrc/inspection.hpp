#pragma once

#include <array>
#include <unordered_map>

#include "slab_store.hpp"

namespace lmcache {

// One look at whether index, slots and lists agree. Under the mutex; changes nothing.
class Inspection {
 public:
  Inspection(SlabStore& store, Check& report)
      : store_(store), control_(store.control_), report_(report) {}
  void run();

 private:
  void look_at(const Index::Read& snapshot, const Key& key, const Found& found);
  void look_at_slots();
  void count(const Slot& slot, uint64_t bytes);
  void look_at_class(uint32_t number);
  void count_list(const List& list, Queue queue, const std::string& name);
  void look_at_totals();
  void problem(const std::string& text);

  SlabStore& store_;
  Control& control_;
  Check& report_;
  uint64_t entries_ = 0, live_ = 0, reserved_ = 0, bytes_ = 0, dirty_bytes_ = 0;
  uint64_t reserved_bytes_ = 0, spilling_bytes_ = 0, forgotten_ = 0, asked_ = 0;
  std::array<uint64_t, kSpaces> pages_in_{}, bytes_in_{};
  std::array<uint32_t, kOwners> held_{};
  std::unordered_map<uint32_t, uint32_t> children_;
  std::vector<uint64_t> free_in_ = std::vector<uint64_t>(kClasses);
};

}  // namespace lmcache
