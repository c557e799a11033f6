#include "page_send.hpp"

#include "wire.hpp"

namespace lmcache {
namespace {

// A frame that libzmq has; it keeps the buffer alive.
struct Held {
  explicit Held(const std::shared_ptr<SendBuffer>& buffer) : buffer(buffer) {
    buffer->frame_begins();
  }
  ~Held() { buffer->frame_ended(); }

  const std::shared_ptr<SendBuffer> buffer;
};

void let_go(void*, void* held) { delete static_cast<Held*>(held); }

Sent sent_after(int error) {
  switch (error) {
    case EAGAIN:
      return Sent::Full;
    case EHOSTUNREACH:
      return Sent::Gone;
    default:
      return Sent::Broken;
  }
}

std::span<const uint8_t> bytes_of(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

class FrameSender {
 public:
  FrameSender(const Libzmq& zmq, void* socket, const Outgoing& outgoing)
      : zmq_(zmq), socket_(socket), outgoing_(outgoing) {}

  // A ROUTER that took the route takes the rest: it looks for room only there.
  int send(const OutgoingPage& page, uint64_t offset) {
    ZmqPart route(zmq_), body(zmq_), payload(zmq_);
    const wire::Body message({wire::kPage, outgoing_.request, page.page, offset, page.checksum});
    if (const int error = route.copy(bytes_of(outgoing_.route))) return error;
    if (const int error = body.copy(message.bytes())) return error;
    if (const int error = refer(payload, page, offset)) return error;
    if (const int error = route.send(socket_, true)) return error;
    if (body.send(socket_, true) != 0 || payload.send(socket_, false) != 0) return EIO;
    return 0;
  }

 private:
  int refer(ZmqPart& payload, const OutgoingPage& page, uint64_t offset) {
    auto held = std::make_unique<Held>(outgoing_.buffer);
    const uint64_t bytes = std::min(outgoing_.frame, page.bytes - offset);
    const int error = payload.refer({page.address + offset, bytes}, &let_go, held.get());
    if (error == 0) held.release();
    return error;
  }

  const Libzmq& zmq_;
  void* const socket_;
  const Outgoing& outgoing_;
};

}  // namespace

SendOutcome send_frames(const Libzmq& zmq, void* socket, const Outgoing& outgoing, size_t first) {
  FrameSender sender(zmq, socket, outgoing);
  size_t number = 0;
  for (const OutgoingPage& page : outgoing.pages) {
    for (uint64_t offset = 0; offset < page.bytes; offset += outgoing.frame, ++number) {
      if (number < first) continue;
      if (const int error = sender.send(page, offset)) return {sent_after(error), number};
    }
  }
  return {Sent::All, number};
}

}  // namespace lmcache
