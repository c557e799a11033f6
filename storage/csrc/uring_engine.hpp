// Requests carried by io_uring: each calling thread has a ring of its own for the length of its
// call.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "engine.hpp"
#include "ring.hpp"

namespace lmcache::io {

// One call: its requests in flight, and whose turn is next.
class UringRun {
 public:
  // `depth` is what is in flight at most; it is shared with the other calls that are `active`.
  UringRun(Batch& batch, Ring& ring, unsigned depth, const std::atomic<unsigned>& active)
      : batch_(batch), ring_(ring), depth_(depth), active_(active), places_(depth + 1) {}

  void go() {
    while (begin_some(true), in_flight_ > 0) {
      ring_.submit();
      ring_.reap([this](uint64_t tag, int result) { land(places_[tag], result); });
    }
  }

 private:
  struct Place {
    BufferPool::Loan loan;
    std::optional<Flight> flight;
  };

  // The share may shrink while requests are in flight; then none begins until some are done.
  unsigned share() const {
    return std::max(1U, depth_ / std::max(1U, active_.load(std::memory_order_relaxed)));
  }

  void begin_some(bool may_wait) {
    while (next_ < batch_.size() && in_flight_ < share()) {
      try {
        if (!begin(next_, may_wait && in_flight_ == 0)) return;
      } catch (const std::bad_alloc&) {
        batch_.fail(next_, ENOMEM);
      }
      ++next_;
    }
  }

  // False when there is no buffer to be had now. Nothing throws once the kernel has the request.
  bool begin(size_t request, bool may_wait) {
    BufferPool::Loan loan;
    if (batch_[request].needs_buffer) {
      auto& buffers = batch_.buffers();
      loan = may_wait ? buffers.take(batch_.limits()) : buffers.try_take();
      if (!loan && may_wait) batch_.fail(request, ECANCELED);
      if (!loan) return may_wait;
    }
    Place& place = *std::ranges::find_if(places_, [](const Place& p) { return !p.flight; });
    place.flight.emplace(batch_.flight(request, loan.address()));
    place.loan = std::move(loan);
    launch(place);
    return true;
  }

  void launch(Place& place) {
    const Flight& flight = *place.flight;
    if (const int error = batch_.begin(flight)) {
      settle(place, {0, error});
      return;
    }
    ring_.push(batch_.direction(), batch_.descriptor(), flight.vectors, flight.offset(),
               static_cast<uint64_t>(&place - places_.data()));
    ++in_flight_;
  }

  // The next request is on its way before this one's checksum is computed.
  void land(Place& place, int result) {
    --in_flight_;
    begin_some(false);
    ring_.submit();
    settle(place, complete(*place.flight, result));
  }

  // What the ring did not bring to its end goes on in this thread, which knows about short
  // transfers, refused direct I/O and the like.
  Moved complete(Flight& flight, int result) {
    const uint64_t moved = result > 0 ? static_cast<uint64_t>(result) : 0;
    if (moved == flight.bytes) return {moved, 0};
    const auto rest = SlotFile::after(flight.vectors, moved);
    const Moved more = batch_.move(rest, flight.offset() + moved);
    return {moved + more.bytes, more.error};
  }

  void settle(Place& place, const Moved& moved) {
    batch_.settle(*place.flight, moved);
    place.flight.reset();
    place.loan = {};
  }

  Batch& batch_;
  Ring& ring_;
  const unsigned depth_;
  const std::atomic<unsigned>& active_;
  std::vector<Place> places_;  // one more than is in flight: that one's checksum is being computed
  size_t next_ = 0;
  unsigned in_flight_ = 0;
};

// One of the calls that share the depth.
class Active {
 public:
  explicit Active(std::atomic<unsigned>& count) : count_(count) {
    count_.fetch_add(1, std::memory_order_relaxed);
  }
  ~Active() { count_.fetch_sub(1, std::memory_order_relaxed); }
  Active(const Active&) = delete;
  Active& operator=(const Active&) = delete;

 private:
  std::atomic<unsigned>& count_;
};

class UringEngine : public Engine {
 public:
  // Throws std::system_error where there is no io_uring.
  explicit UringEngine(unsigned depth) : depth_(depth) {
    free_.push_back(std::make_unique<Ring>(depth_));
  }

  const char* name() const override { return "io_uring"; }

  void run(Batch& batch) override {
    auto ring = take();
    if (!ring) {
      for (size_t request = 0; request < batch.size(); ++request) batch.perform(request);
      return;
    }
    UringRun call(batch, *ring, depth_, active_);
    {
      const Active counted(active_);
      call.go();
    }
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(ring));
  }

 private:
  std::unique_ptr<Ring> take() {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        auto ring = std::move(free_.back());
        free_.pop_back();
        return ring;
      }
    }
    try {
      return std::make_unique<Ring>(depth_);
    } catch (const std::system_error&) {
      return nullptr;  // out of files or of locked memory: then one request after the other
    }
  }

  const unsigned depth_;
  std::atomic<unsigned> active_ = 0;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Ring>> free_;
};

}  // namespace lmcache::io
