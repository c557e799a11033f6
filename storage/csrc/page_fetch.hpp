// Fetches a batch of pages from peers, over several connections at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "frame_acceptor.hpp"
#include "transfer.hpp"
#include "zmq_api.hpp"

namespace lmcache {

// Why a stream ended. peers/fetch.py has the same numbers, and says what they mean.
enum class Ended : uint8_t { Complete, Corrupt, Busy, Stalled, Late, Cancelled, Broken };

// A `Get` to one peer over one connection, and what is needed to follow it. What the views name
// must stay valid.
struct StreamRequest {
  void* socket;  // a DEALER that no other thread and no other stream uses meanwhile
  uint64_t request;
  std::string_view get;     // the message, encoded
  std::string_view credit;  // another one, which grants more
  uint64_t first_grant;     // bytes, by `get`
  uint64_t next_grant;      // bytes, by each `credit`; not 0
  uint64_t frame;           // bytes, not 0
  double stall_seconds;
  std::vector<WantedPage> pages;  // in the order of `get`
};

// Bytes that were taken out of libzmq, by whichever thread; peers/meter.py says what for.
class Tally {
 public:
  void add(uint64_t bytes) { total_.fetch_add(bytes, std::memory_order_relaxed); }
  uint64_t total() const { return total_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> total_{0};
};

struct StreamOutcome {
  Ended ended;
  uint64_t bytes;           // taken
  uint64_t ignored;         // messages that were of no use
  double seconds_to_first;  // frame from the `Get`; negative: none came
  double seconds;           // in all
  std::vector<Came> pages;
};

// taken: of each request. Ends when every page is settled or the limits have passed, within about
// 50 ms.
std::vector<StreamOutcome> fetch_pages(const Libzmq& zmq, std::span<const StreamRequest> requests,
                                       const Limits& limits, std::span<Tally* const> taken);

}  // namespace lmcache
