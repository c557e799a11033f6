// Caches of pages without pages: which of a trace's requests would have been served from one, by
// policy and size.
//
// A page is a number, below the count of pages. A request is its chain of pages; what is served of
// it is the prefix that is there, and after it all of its pages were used, in their order.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace lmcache {

using Chain = std::span<const uint32_t>;

// A trace: requests one after the other. `ends`: where each ends, in `pages`.
struct Trace {
  std::vector<uint32_t> pages;
  std::vector<uint64_t> ends;
  uint32_t count = 0;  // of different pages

  Trace(std::vector<uint32_t> pages, std::vector<uint64_t> ends);
};

class SimulatedCache {
 public:
  virtual ~SimulatedCache() = default;
  virtual bool has(uint32_t page) const = 0;
  virtual void use(Chain chain) = 0;
  // Pages that were written so far.
  uint64_t written() const { return written_; }

 protected:
  uint64_t written_ = 0;
};

struct Outcome {
  uint64_t references = 0;  // pages of requests
  uint64_t hits = 0;        // of them, in a prefix that was there
  uint64_t written = 0;
};

// Names, as `simulate` takes them. Throws std::invalid_argument for another one.
std::vector<std::string> simulated_policies();
Outcome simulate(const Trace& trace, uint32_t room, const std::string& policy);

std::unique_ptr<SimulatedCache> make_learned_cache(uint32_t pages, uint32_t room);

}  // namespace lmcache
