// The seam where tests make storage slow, broken or dead. Every step of I/O or of syncing asks it
// first.
//
// Without a hook a step costs one relaxed load.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

namespace lmcache {

enum class Step {
  Read,            // a range of the slot file is about to be read
  Write,           // a range of the slot file is about to be written
  Flush,           // the slot file is about to be synced
  IndexBegin,      // a transaction of the index is about to begin
  IndexCommit,     // ... is about to be committed
  IndexCommitted,  // ... has been committed
  Reserve,         // slots are about to be taken for pages
  Publish,         // written slots are about to become visible
  Allocate,        // space for the slot file is about to be taken
};

inline const char* name_of(Step step) {
  switch (step) {
    case Step::Read:
      return "read";
    case Step::Write:
      return "write";
    case Step::Flush:
      return "flush";
    case Step::IndexBegin:
      return "index_begin";
    case Step::IndexCommit:
      return "index_commit";
    case Step::IndexCommitted:
      return "index_committed";
    case Step::Reserve:
      return "reserve";
    case Step::Publish:
      return "publish";
    case Step::Allocate:
      return "allocate";
  }
  return "unknown";
}

// Returns the errno that the step shall fail with, or 0 to go on. It may sleep, or end the process.
using StepHook = std::function<int(Step, uint64_t offset, uint64_t bytes)>;

namespace steps {

inline std::atomic<bool> hooked{false};
inline std::mutex mutex;
inline std::shared_ptr<const StepHook> hook;

inline std::shared_ptr<const StepHook> current() {
  const std::lock_guard lock(mutex);
  return hook;
}

}  // namespace steps

// For the whole process; an empty function takes the hook away. Steps that already run keep the old
// one.
inline void set_step_hook(StepHook function) {
  std::shared_ptr<const StepHook> next;
  if (function) next = std::make_shared<const StepHook>(std::move(function));
  {
    const std::lock_guard lock(steps::mutex);
    steps::hooked.store(next != nullptr, std::memory_order_relaxed);
    std::swap(steps::hook, next);
  }
  // The old hook ends here, outside the lock: what it holds may need the GIL.
}

inline int step(Step kind, uint64_t offset, uint64_t bytes) {
  if (!steps::hooked.load(std::memory_order_relaxed)) [[likely]]
    return 0;
  const auto hook = steps::current();
  return hook ? (*hook)(kind, offset, bytes) : 0;
}

}  // namespace lmcache
