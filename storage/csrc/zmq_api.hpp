// The few functions of libzmq that are used here, found at run time in the libzmq that pyzmq uses.
//
// Sockets belong to Python, so both sides must use one library; linking would bring a second one.
// What is declared here is libzmq's stable interface since 4.2 (http://api.zeromq.org/4-2:zmq).
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>

namespace lmcache {

struct ZmqPollItem {
  void* socket;
  int file;
  short events;
  short happened;
};

using ZmqFree = void(void* data, void* hint);  // called by any thread, an I/O thread of libzmq too

inline constexpr int kZmqDontWait = 1;
inline constexpr int kZmqMoreFollows = 2;
inline constexpr short kZmqPollIn = 1;

struct Libzmq {
  int (*msg_init)(void*);
  int (*msg_init_size)(void*, size_t);
  int (*msg_init_data)(void*, void*, size_t, ZmqFree*, void*);
  int (*msg_recv)(void*, void*, int);
  int (*msg_send)(void*, void*, int);
  int (*msg_close)(void*);
  void* (*msg_data)(void*);
  size_t (*msg_size)(const void*);
  int (*msg_more)(const void*);
  int (*poll)(ZmqPollItem*, int, long);
  int (*error)();
};

// One part of a message.
class ZmqPart {
 public:
  explicit ZmqPart(const Libzmq& zmq) : zmq_(zmq) { zmq_.msg_init(opaque_); }
  ~ZmqPart() { zmq_.msg_close(opaque_); }
  ZmqPart(const ZmqPart&) = delete;
  ZmqPart& operator=(const ZmqPart&) = delete;

  // All return 0 or an error number.
  int receive(void* socket) {
    return uninterrupted([&] { return zmq_.msg_recv(opaque_, socket, kZmqDontWait); });
  }
  // The part is empty once it is sent.
  int send(void* socket, bool more) {
    const int flags = kZmqDontWait | (more ? kZmqMoreFollows : 0);
    return uninterrupted([&] { return zmq_.msg_send(opaque_, socket, flags); });
  }
  int copy(std::span<const uint8_t> bytes) {
    zmq_.msg_close(opaque_);
    if (zmq_.msg_init_size(opaque_, bytes.size()) != 0) return emptied();
    std::copy(bytes.begin(), bytes.end(), static_cast<uint8_t*>(zmq_.msg_data(opaque_)));
    return 0;
  }
  // `free` is called once the bytes are needed no more, but not after an error.
  int refer(std::span<uint8_t> bytes, ZmqFree* free, void* hint) {
    zmq_.msg_close(opaque_);
    return zmq_.msg_init_data(opaque_, bytes.data(), bytes.size(), free, hint) == 0 ? 0 : emptied();
  }

  bool more() const { return zmq_.msg_more(opaque_) != 0; }
  std::span<const uint8_t> bytes() {
    return {static_cast<const uint8_t*>(zmq_.msg_data(opaque_)), zmq_.msg_size(opaque_)};
  }

 private:
  template <class Call>
  int uninterrupted(const Call& call) {
    while (call() < 0)
      if (const int error = zmq_.error(); error != EINTR) return error;
    return 0;
  }
  int emptied() {
    zmq_.msg_init(opaque_);
    return ENOMEM;
  }

  const Libzmq& zmq_;
  alignas(void*) uint8_t opaque_[64];  // zmq_msg_t
};

}  // namespace lmcache
