// The volatile half of a store, in memory that all its processes share: which slots are free, who
// uses what, what was used lately. The index alone says what the store has; all of this can be made
// anew from it (rebuild in slab_store.cpp), and is when a process died in the middle of a change.
//
// Everything but the atomics is read and changed under the one mutex here. It is robust: when its
// holder dies, the next one is told. No data I/O happens under it.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

#include "failure.hpp"
#include "key.hpp"
#include "transfer.hpp"

namespace lmcache {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

inline constexpr uint32_t kNone = 0xFFFFFFFF;
inline constexpr uint32_t kControlVersion = 4;
inline constexpr uint32_t kSlotsMost = 16384;  // in one slab
inline constexpr uint32_t kClasses = 48;
inline constexpr uint32_t kSpaces = 256;
inline constexpr uint32_t kOwners = 256;

enum class State : uint8_t { Free, Reserved, Live };

// In which list a slot is. Small and Main are the policies' two; Free is its class's.
enum class Queue : uint8_t { None, Free, Dirty, Small, Main };

enum Flag : uint8_t {
  kSpilling = 1,   // its owner is writing it to the tier below
  kUnspilled = 2,  // the tier below does not have it, and nobody has asked to write it yet
  kOnce = 4,       // used since it came
  kAgain = 8,      // and once more
  kHeld = 16,      // not for the tier below until one of its descendants is
  kShown = 32,     // with kSpilling: its owner only lets others read it, in place
  kAsked = 64,     // while it is shown, somebody asked to write it below
};

struct Slot {
  uint8_t hash[kHashBytes];  // with `space`, the key of the page here
  std::atomic<uint16_t> space;
  uint16_t owner;  // of a reservation, or of the spill in hand; 0: nobody
  std::atomic<uint32_t> generation;
  uint32_t prev, next;
  std::atomic<uint32_t> tick;  // of the batch that used it last
  uint32_t children;           // pages here that name this one as their parent
  uint32_t pinned_until;       // seconds since 1970; 0: not pinned
  std::atomic<uint8_t> visited;
  State state;
  Queue queue;
  std::atomic<uint8_t> flags;
};
static_assert(sizeof(Slot) == 64);

struct List {
  uint32_t newest, oldest, count;
};

// Slots of one size.
struct Class {
  uint32_t slot_blocks;  // size of a slot in blocks; 0: this class is not in use
  uint32_t slots;        // in one slab
  uint32_t slabs;
  List free, small, main;
  uint32_t hand;  // SIEVE's, a slot of `main`
  uint32_t spare[2];
};
static_assert(sizeof(Class) == 60);

struct Slab {
  uint32_t kind;  // number of its class; kNone: free
  uint32_t live;  // slots not free
};

struct Space {
  uint8_t name[kNamespaceBytes];
  uint64_t pages;              // live or reserved
  uint64_t bytes;              // of their slots
  uint64_t quota;              // 0: none
  std::atomic<uint32_t> tick;  // of the batch that used it last
  uint32_t spare;

  void take(uint64_t its_pages, uint64_t its_bytes) {
    pages = its_pages;
    bytes = its_bytes;
    quota = 0;
  }
};

struct Owner {
  uint32_t held;  // slots reserved or being spilled
};

struct Ghost {
  uint32_t print;  // of an evicted page's hash
  uint32_t when;   // number of the eviction
};

enum Readiness : uint32_t { kMaking = 0, kWhole = 1, kBroken = 2 };

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t policy;  // this and the next two as the first process was told
  uint32_t below, sync;
  uint8_t store[16];  // the store's own id
  uint8_t boot[16];   // of the machine's run: what a mutex's memory says is void after a reboot
  uint64_t slab_bytes;
  uint32_t slabs;
  uint32_t slots_per_slab;
  std::atomic<uint32_t> ready;  // 0: being made; else a Readiness
  std::atomic<uint32_t> work;   // moves when there is something to spill; waited on as a futex
  std::atomic<uint32_t> room;   // moves when slots came free or clean
  std::atomic<uint32_t> clock;  // one tick a batch
  uint64_t sequence;
  uint64_t pages, bytes;              // live
  uint64_t reserved, reserved_bytes;  // slots taken for pages that are not published yet
  std::atomic<uint64_t> evicted;      // read without the mutex too
  uint64_t dirty_bytes, spilling_bytes;
  std::atomic<uint64_t> forgotten;  // slots of pages that were removed while written below
  uint64_t asked;                   // that are shown, and asked for below meanwhile
  uint64_t lost;                    // dirty pages given up for room
  List dirty;
  uint32_t ghosts_used;
  pthread_mutex_t mutex;
  Class classes[kClasses];
};
static_assert(sizeof(Header) <= 4096);

struct Shape {
  uint64_t slab_bytes;
  uint32_t slabs;
  uint32_t slots_per_slab;
  uint32_t ghosts;

  bool operator==(const Shape&) const = default;
  uint64_t control_bytes() const;
  uint64_t region_bytes() const { return slab_bytes * slabs; }
};

class Control {
 public:
  // Maps the file, which must be as long as the shape asks for.
  Control(const std::string& path, const Shape& shape);
  ~Control();
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  // Whether what the file holds was made for this store, by this version, since the machine
  // started.
  bool usable(const uint8_t (&store)[16]) const;
  // Empties everything; for who has the store alone.
  void format(const uint8_t (&store)[16], uint32_t policy);
  // Of what `rebuild` counts anew.
  void clear_counts();
  // Empties its lists; a class with slabs keeps the size of its slots, in every moment of this.
  void clear_class(uint32_t number, uint32_t slabs);

  const Shape& shape() const { return shape_; }
  Header& header() { return *header_; }
  Space& space(uint32_t number);
  Owner& owner(uint32_t number);
  Ghost* ghosts() { return ghosts_; }
  Slab& slab(uint32_t number);
  Slot& slot(uint32_t number);
  Class& kind(uint32_t number);

  // The first slots of a slab, whatever they held; their generations stay.
  void reset_slots(uint32_t slab, uint32_t count);
  void reset_slot(uint32_t slot);

  // A count of slots that the block holds, for use as a bound: no list is longer than there are
  // slots.
  uint64_t believable(uint64_t count) const {
    return std::min(count, uint64_t{shape_.slabs} * shape_.slots_per_slab);
  }

  uint32_t slab_of(uint32_t slot) const { return slot / shape_.slots_per_slab; }
  Class& kind_of(uint32_t slot) { return kind(slab(slab_of(slot)).kind); }
  uint64_t offset_of(uint32_t slot);
  uint64_t slot_bytes(uint32_t slot) { return kind_of(slot).slot_blocks * kBlock; }
  // The slot that starts there; kNone when none does.
  uint32_t slot_at(uint64_t offset);
  // False for a number that its slab's slots, of the size that they have now, do not reach.
  bool is_of_its_slab(uint32_t slot);
  Key key_of(uint32_t slot);

  // The namespace's number; kNone when it has none. `intern` gives it one, while there are any
  // left.
  uint32_t find_space(std::string_view name);
  uint32_t intern_space(std::string_view name);

  void push_newest(List& list, uint32_t slot, Queue queue);
  void push_oldest(List& list, uint32_t slot, Queue queue);
  void push_older(List& list, uint32_t than, uint32_t slot, Queue queue);
  void unlink(List& list, uint32_t slot);

 private:
  Shape shape_;
  uint8_t* base_ = nullptr;
  Header* header_;
  Owner* owners_;
  Space* spaces_;
  Ghost* ghosts_;
  Slab* slabs_;
  Slot* slots_;
};

// Holds the shared mutex. When its last holder died in the middle of a change, `ready` says
// afterwards that all of this is to be made anew.
class Lock {
 public:
  Lock(Control& control, Deadline deadline);  // throws Failure (Busy)
  ~Lock();
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  pthread_mutex_t* mutex_;
};

// Waiting for another process, on a word of shared memory. True: it moved on from `seen`.
bool wait_while(std::atomic<uint32_t>& word, uint32_t seen, Deadline deadline);
void advance(std::atomic<uint32_t>& word);

}  // namespace lmcache
