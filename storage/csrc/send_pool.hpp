// Memory that a server reads pages into and sends them from, of a bounded size in all.
#pragma once

#include <sys/eventfd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "buffers.hpp"
#include "slab_store.hpp"

namespace lmcache {

// libzmq refers to it frame by frame, and lets go of each from a thread of its own. Pages that can
// be sent from where they lie are shown instead; then it is what counts them, and what they wait
// for.
class SendBuffer : public std::enable_shared_from_this<SendBuffer> {
 public:
  explicit SendBuffer(size_t bytes) : memory_(io::huge_bytes(bytes)), bytes_(bytes) {}

  uint8_t* address() const { return memory_.get(); }
  size_t size() const { return bytes_; }

  // Once, before the first frame.
  void keep(std::shared_ptr<const Shown> shown) { shown_ = std::move(shown); }
  // Whether this lies in it, or is one of the pages shown.
  bool has(const uint8_t* at, uint64_t bytes) const {
    const uint64_t offset = reinterpret_cast<uint64_t>(at) - reinterpret_cast<uint64_t>(address());
    return (offset <= bytes_ && bytes <= bytes_ - offset) || (shown_ && shown_->holds(at, bytes));
  }

  // Frames that libzmq still has. Their bytes must not change.
  uint64_t frames() const { return frames_.load(std::memory_order_acquire); }
  void frame_begins() { frames_.fetch_add(1, std::memory_order_relaxed); }
  void frame_ended() { frames_.fetch_sub(1, std::memory_order_release); }

 private:
  friend class SendPool;
  io::AlignedBytes memory_;
  const size_t bytes_;
  std::shared_ptr<const Shown> shown_;
  std::atomic<uint64_t> frames_{0};
  SendBuffer* next_ = nullptr;  // of those that came back
  uint64_t owner_ = 0;          // for whom it was taken
};

// A buffer comes back when everybody let go of it, libzmq too, and is kept for the next taker:
// memory that is new costs more than sending it. Buffers may outlive the pool.
class SendPool {
 public:
  static constexpr size_t kUnit = 2 << 20;  // buffers are a multiple: one huge page

  explicit SendPool(size_t bytes_most) : shelf_(std::make_shared<Shelf>(bytes_most)) {}

  // Of at least so many bytes, or nothing while others have too much. Throws std::invalid_argument
  // when it can never be had. `owner`: for whom; see `bytes_lent_to`.
  std::shared_ptr<SendBuffer> take(size_t bytes, uint64_t owner) {
    const size_t whole = (bytes / kUnit + (bytes % kUnit != 0)) * kUnit;
    if (bytes == 0 || whole < bytes || whole > shelf_->bytes_most)
      throw std::invalid_argument("a buffer of this size is beyond the pool");
    std::unique_ptr<SendBuffer> buffer = shelf_->take(whole, owner);
    if (!buffer) return {};
    const auto put_back = [shelf = shelf_](SendBuffer* back) { shelf->put_back(back); };
    return {buffer.release(), put_back};
  }

  // Of the buffers that somebody has.
  size_t bytes_lent() const { return shelf_->bytes_lent(); }
  // Of those that were taken for one owner, and have not come back whatever it says.
  size_t bytes_lent_to(uint64_t owner) const { return shelf_->bytes_lent_to(owner); }

  // What was shown with buffers that have come back since the last call.
  std::vector<std::shared_ptr<const Shown>> seen() const { return shelf_->seen(); }

  // Is readable, as poll(2) means it, once a buffer came back after the last `hear`.
  int bell() const { return shelf_->bell.number(); }
  void hear() const {
    uint64_t rung;
    [[maybe_unused]] const ssize_t n = ::read(bell(), &rung, sizeof rung);  // EAGAIN: it was silent
  }

 private:
  using Buffers = std::vector<std::unique_ptr<SendBuffer>>;

  struct Shelf {
    explicit Shelf(size_t bytes)
        : bytes_most(bytes), bell(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
      if (!bell) throw std::system_error(errno, std::generic_category(), "eventfd");
    }
    ~Shelf() { collect(); }

    // Called by libzmq's threads: it neither waits nor allocates.
    void put_back(SendBuffer* buffer) {
      buffer->next_ = returned.load(std::memory_order_relaxed);
      while (!returned.compare_exchange_weak(buffer->next_, buffer, std::memory_order_release,
                                             std::memory_order_relaxed)) {
      }
      const uint64_t once = 1;
      [[maybe_unused]] const ssize_t n = ::write(bell.number(), &once, sizeof once);
    }

    std::unique_ptr<SendBuffer> take(size_t bytes, uint64_t owner) {
      const std::lock_guard lock(mutex);
      collect();
      auto buffer = take_free(bytes);
      if (!buffer) buffer = make(bytes);
      if (!buffer) return {};
      buffer->owner_ = owner;
      lent[owner] += buffer->size();
      return buffer;
    }

    std::unique_ptr<SendBuffer> make(size_t bytes) {
      if (made - free_bytes() + bytes > bytes_most) return {};
      while (made + bytes > bytes_most) drop();
      auto buffer = std::make_unique<SendBuffer>(bytes);
      made += bytes;
      return buffer;
    }

    size_t bytes_lent() {
      const std::lock_guard lock(mutex);
      collect();
      return made - free_bytes();
    }

    size_t bytes_lent_to(uint64_t owner) {
      const std::lock_guard lock(mutex);
      collect();
      const auto found = lent.find(owner);
      return found == lent.end() ? 0 : found->second;
    }

    std::vector<std::shared_ptr<const Shown>> seen() {
      const std::lock_guard lock(mutex);
      collect();
      return std::exchange(done_with, {});
    }

    void collect() {
      SendBuffer* each = returned.exchange(nullptr, std::memory_order_acquire);
      while (each) {
        std::unique_ptr<SendBuffer> buffer(each);
        each = buffer->next_;
        const auto account = lent.find(buffer->owner_);
        if ((account->second -= buffer->size()) == 0) lent.erase(account);
        if (buffer->shown_) done_with.push_back(std::move(buffer->shown_));
        free.push_back(std::move(buffer));
      }
    }

    // The last one that is large enough, but not more than twice that.
    std::unique_ptr<SendBuffer> take_free(size_t bytes) {
      for (auto at = free.rbegin(); at != free.rend(); ++at) {
        if ((*at)->size() < bytes || (*at)->size() / 2 > bytes) continue;
        std::unique_ptr<SendBuffer> found = std::move(*at);
        free.erase(std::next(at).base());
        return found;
      }
      return {};
    }

    size_t free_bytes() const {
      size_t bytes = 0;
      for (const auto& buffer : free) bytes += buffer->size();
      return bytes;
    }

    void drop() {
      made -= free.front()->size();
      free.erase(free.begin());
    }

    const size_t bytes_most;
    const io::Descriptor bell;
    std::atomic<SendBuffer*> returned{nullptr};
    std::mutex mutex;  // of all below; never taken by libzmq's threads
    Buffers free;
    std::vector<std::shared_ptr<const Shown>> done_with;
    size_t made = 0;                            // bytes of all buffers that there are
    std::unordered_map<uint64_t, size_t> lent;  // bytes, by owner
  };

  std::shared_ptr<Shelf> shelf_;
};

}  // namespace lmcache
