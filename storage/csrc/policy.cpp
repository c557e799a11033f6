#include "policy.hpp"

#include <cstring>

namespace lmcache {

namespace {

constexpr uint32_t kSmallShare = 10;  // percent of a class's pages that S3-FIFO tries out

// What all three share: one list, `main`.
class OneList : public Policy {
 public:
  explicit OneList(Control& control) : control_(control) {}
  void insert(Class& kind, uint32_t slot) override {
    control_.push_newest(kind.main, slot, Queue::Main);
  }
  void restore(Class& kind, uint32_t slot) override {
    control_.push_oldest(kind.main, slot, Queue::Main);
  }
  void forget(Class& kind, uint32_t slot) override { control_.unlink(kind.main, slot); }
  uint32_t oldest(const Class& kind) override {
    return kind.main.oldest == kNone ? kNone : control_.slot(kind.main.oldest).tick.load();
  }

 protected:
  Control& control_;
};

// SIEVE (Zhang et al., NSDI '24): a hand moves from old to new; a page visited since it passed last
// stays where it is, the first other one goes.
class Sieve : public OneList {
 public:
  using OneList::OneList;
  void restore(Class& kind, uint32_t slot) override {
    // Right where the hand is, so that it comes next: at the old end it would draw the hand back
    // there.
    if (kind.hand == kNone) {
      OneList::restore(kind, slot);
    } else {
      control_.push_older(kind.main, kind.hand, slot, Queue::Main);
    }
    kind.hand = slot;
  }
  void forget(Class& kind, uint32_t slot) override {
    if (kind.hand == slot) kind.hand = control_.slot(slot).prev;
    OneList::forget(kind, slot);
  }
  uint32_t pick(Class& kind, const Keep& keep) override {
    uint64_t steps = 2 * control_.believable(kind.main.count) + 1;
    for (uint32_t at = kind.hand; steps-- > 0 && kind.main.count > 0;) {
      if (at == kNone) at = kind.main.oldest;
      Slot& slot = control_.slot(at);
      const bool stays = slot.visited.exchange(0) != 0 || keep(slot);
      kind.hand = slot.prev;
      if (!stays) {
        OneList::forget(kind, at);
        return at;
      }
      at = kind.hand;
    }
    return kNone;
  }
};

// Least recently used, as far as one shared byte tells: a page used since it was last looked at
// goes round once more (second chance).
class Lru : public OneList {
 public:
  using OneList::OneList;
  uint32_t pick(Class& kind, const Keep& keep) override {
    for (uint64_t steps = 2 * control_.believable(kind.main.count) + 1;
         steps-- > 0 && kind.main.count > 0;) {
      const uint32_t at = kind.main.oldest;
      Slot& slot = control_.slot(at);
      const bool stays = slot.visited.exchange(0) != 0 || keep(slot);
      OneList::forget(kind, at);
      if (!stays) return at;
      insert(kind, at);
    }
    return kNone;
  }
};

// S3-FIFO (Yang et al., SOSP '23): newcomers try out in a small queue; those used there more than
// once, or that come back soon after they went, get into the main one, which gives a second chance
// for each use.
class S3Fifo : public Policy {
 public:
  explicit S3Fifo(Control& control) : control_(control) {}
  void insert(Class& kind, uint32_t slot) override {
    const bool again = was_here(control_.slot(slot));
    control_.push_newest(again ? kind.main : kind.small, slot, again ? Queue::Main : Queue::Small);
  }
  // To where newcomers are judged: its uses say whether it stays.
  void restore(Class& kind, uint32_t slot) override {
    control_.push_oldest(kind.small, slot, Queue::Small);
  }
  void forget(Class& kind, uint32_t slot) override { control_.unlink(list_of(kind, slot), slot); }
  uint32_t oldest(const Class& kind) override {
    const List& from = small_gives(kind) ? kind.small : kind.main;
    return from.oldest == kNone ? kNone : control_.slot(from.oldest).tick.load();
  }
  uint32_t pick(Class& kind, const Keep& keep) override {
    const uint64_t pages = control_.believable(uint64_t{kind.main.count} + kind.small.count);
    for (uint64_t steps = 5 * pages + 1; steps-- > 0;) {
      const bool small = small_gives(kind);
      List& from = small ? kind.small : kind.main;
      if (from.oldest == kNone) return kNone;
      const uint32_t at = from.oldest;
      if (goes(kind, at, small, keep)) return at;
    }
    return kNone;
  }

 private:
  static bool small_gives(const Class& kind) {
    const uint64_t pages = uint64_t{kind.main.count} + kind.small.count;
    return kind.main.count == 0 || uint64_t{kind.small.count} * 100 > pages * kSmallShare;
  }

  List& list_of(Class& kind, uint32_t slot) {
    return control_.slot(slot).queue == Queue::Small ? kind.small : kind.main;
  }

  bool goes(Class& kind, uint32_t at, bool small, const Keep& keep) {
    Slot& slot = control_.slot(at);
    const uint8_t uses = slot.visited.load();
    const bool stays = (small ? uses > 1 : uses > 0) || keep(slot);
    forget(kind, at);
    if (!stays) {
      if (small) remember(slot);
      return true;
    }
    slot.visited = small || uses == 0 ? 0 : static_cast<uint8_t>(uses - 1);
    control_.push_newest(kind.main, at, Queue::Main);
    return false;
  }

  static uint32_t print_of(const Slot& slot) {
    uint32_t print;
    std::memcpy(&print, slot.hash, sizeof print);
    return print | 1;  // 0 is an empty place
  }
  Ghost& place_of(uint32_t print) { return control_.ghosts()[print / 2 % control_.shape().ghosts]; }
  void remember(const Slot& slot) {
    const uint32_t print = print_of(slot);
    place_of(print) = {print, control_.header().ghosts_used++};
  }
  bool was_here(const Slot& slot) {
    const uint32_t print = print_of(slot);
    const Ghost& ghost = place_of(print);
    const uint32_t ago = control_.header().ghosts_used - ghost.when;
    return ghost.print == print && ago <= control_.shape().ghosts;
  }

  Control& control_;
};

}  // namespace

std::unique_ptr<Policy> make_policy(PolicyKind kind, Control& control) {
  switch (kind) {
    case PolicyKind::Sieve:
      return std::make_unique<Sieve>(control);
    case PolicyKind::S3Fifo:
      return std::make_unique<S3Fifo>(control);
    case PolicyKind::Lru:
      return std::make_unique<Lru>(control);
  }
  throw std::invalid_argument("no such policy");
}

}  // namespace lmcache
