// Which page gives way. Three policies behind one interface, over lists that lie in shared memory.
//
// A policy sees only pages that may go: leaves (no page here names them as parent) that are not on
// their way to the tier below. A page that gets a child leaves the policy (`forget`), and comes
// back at the end where pages give way when its last child went (`restore`); so an ancestor never
// goes before its descendants, and choosing never walks past pages that must stay.
#pragma once

#include <functional>
#include <memory>

#include "control.hpp"

namespace lmcache {

enum class PolicyKind : uint32_t { Sieve = 0, S3Fifo = 1, Lru = 2 };

class Policy {
 public:
  // Says of a page that would go now that it must stay for this time: pinned, or of the batch at
  // hand.
  using Keep = std::function<bool(Slot&)>;

  virtual ~Policy() = default;
  virtual void insert(Class& kind, uint32_t slot) = 0;
  virtual void restore(Class& kind, uint32_t slot) = 0;
  virtual void forget(Class& kind, uint32_t slot) = 0;
  // Takes the next page to go out of the lists; kNone when none may.
  virtual uint32_t pick(Class& kind, const Keep& keep) = 0;
  // The tick of the page that would go next, roughly; kNone when there is none.
  virtual uint32_t oldest(const Class& kind) = 0;
};

std::unique_ptr<Policy> make_policy(PolicyKind kind, Control& control);

}  // namespace lmcache
