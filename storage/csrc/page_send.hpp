// Sends pages as frames, straight from the memory that they were read into.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "send_pool.hpp"
#include "zmq_api.hpp"

namespace lmcache {

// A page that lies in one piece, in the buffer or where it is shown.
struct OutgoingPage {
  uint64_t page;  // its place in the `Get`
  uint8_t* address;
  uint64_t bytes;
  uint64_t checksum;
};

// How a call ended. peers/frames.py has the same numbers, and says what they mean.
enum class Sent : uint8_t { All, Full, Gone, Broken };

struct SendOutcome {
  Sent sent;
  size_t frames;  // of all pages together, those of earlier calls as well
};

// One answer to a `Get`: frames of some pages, to one receiver.
struct Outgoing {
  std::string_view route;  // the receiver's identity
  uint64_t request;
  std::shared_ptr<SendBuffer> buffer;
  std::span<const OutgoingPage> pages;  // that the buffer has
  uint64_t frame;
};

// Sends what libzmq takes at once, from frame `first` on. The socket is a ROUTER that says so when
// a route is gone or full (ZMQ_ROUTER_MANDATORY).
SendOutcome send_frames(const Libzmq& zmq, void* socket, const Outgoing& outgoing, size_t first);

}  // namespace lmcache
