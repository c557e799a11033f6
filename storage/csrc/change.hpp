// A change of what processes share, under the mutex.
#pragma once

#include <algorithm>
#include <exception>

#include "slab_store.hpp"

namespace lmcache {

inline constexpr int kUnexplainedMost = 3;
inline constexpr auto kReadersWait = std::chrono::milliseconds(50);

// While one is under way the control block says that it is broken; so whoever comes after an
// exception, or after the death of this process, makes it anew from the index before anything else.
class SlabStore::Change {
 public:
  Change(SlabStore& store, Deadline deadline)
      : store_(store), lock_(store.control_, deadline), header_(store.control_.header()) {
    store.ensure_whole();
    header_.ready = kBroken;  // stays so when what follows throws
    store.settle_left_over();
  }
  ~Change() {
    const bool whole = std::uncaught_exceptions() == exceptions_ && !store_.rebuild_next_;
    if (whole) header_.ready = kWhole;
  }
  Change(const Change&) = delete;
  Change& operator=(const Change&) = delete;

 private:
  SlabStore& store_;
  const Lock lock_;
  Header& header_;
  const int exceptions_ = std::uncaught_exceptions();
};

// Does what changes the index, and again while it has no room because another process was
// interrupted in the middle of a lookup: LMDB uses no page again that its snapshot may still see.
// Each attempt in vain costs a rebuild, so the next one waits until such lookups have ended, and
// several that nobody's lookup explains mean that the index is full.
template <class Work>
auto SlabStore::patiently(Deadline deadline, const Work& work) {
  for (int unexplained = 0;;) {
    try {
      return work();
    } catch (const IndexFull&) {
      if (unexplained == kUnexplainedMost || Clock::now() >= deadline) throw;
    }
    if (old_readers_end(std::min(deadline, Clock::now() + kReadersWait))) ++unexplained;
  }
}

// Removals of pages for room, committed before any of their slots is written to.
class SlabStore::Eviction {
 public:
  explicit Eviction(Index& index) : index_(index) {}
  Index::Write& changes() {
    if (!changes_) changes_.emplace(index_);
    return *changes_;
  }
  // Many in one transaction would take more of the index file than there is (slab/plan.py).
  void count_one() {
    if (++count_ % kIndexBatch != 0) return;
    commit();
    changes_.reset();
  }
  void commit() {
    if (changes_) changes_->commit();
  }

 private:
  Index& index_;
  std::optional<Index::Write> changes_;
  size_t count_ = 0;
};

}  // namespace lmcache
