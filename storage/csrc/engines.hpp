// The two ways of having many requests in flight, and which of them is used. Threads work in every
// container; io_uring, where the kernel allows it, is used only if it measures faster on this very
// file, on bytes that were written.
#pragma once

#include <atomic>
#include <memory>

#include "device.hpp"
#include "probe.hpp"
#include "thread_engine.hpp"
#include "uring_engine.hpp"

namespace lmcache::io {

class Engines {
 public:
  // Throws std::system_error where io_uring is demanded, and there is none.
  Engines(unsigned depth, DeviceOptions::Engine wanted) {
    using Wanted = DeviceOptions::Engine;
    if (wanted != Wanted::Uring) threads_ = std::make_unique<ThreadEngine>(depth);
    if (wanted == Wanted::Uring) uring_ = std::make_unique<UringEngine>(depth);
    if (wanted == Wanted::Auto) uring_ = uring_if_any(depth);
    current_ = threads_ ? threads_.get() : uring_.get();
    decided_ = !threads_ || !uring_;
  }

  Engine& current() const { return *current_.load(std::memory_order_relaxed); }

  // Once; calls that are under way end with the engine that they began with.
  void decide(SlotFile& file, BufferPool& buffers, unsigned depth, const Range& range,
              bool through_buffers) {
    if (decided_.exchange(true)) return;
    Probe probe(file, buffers, depth, range);
    if (probe.is_faster({*uring_, through_buffers}, {*threads_, through_buffers}))
      current_ = uring_.get();
  }

 private:
  static std::unique_ptr<Engine> uring_if_any(unsigned depth) {
    try {
      return std::make_unique<UringEngine>(depth);
    } catch (const std::system_error&) {
      return nullptr;
    }
  }

  std::unique_ptr<Engine> threads_, uring_;
  std::atomic<Engine*> current_;
  std::atomic<bool> decided_;
};

}  // namespace lmcache::io
