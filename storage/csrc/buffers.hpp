// Buffers for the pages that direct I/O cannot, or had better not, move straight from or into their
// memory.
#pragma once

#include <sys/mman.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "slot_file.hpp"

namespace lmcache::io {

// On huge pages where there are some: a virtual disk takes 2 MiB in one piece then, instead of in
// 512, and reads 2.4 times as fast. A refusal costs only that.
inline AlignedBytes huge_bytes(size_t bytes) {
  constexpr size_t kHugePage = 2 << 20;
  AlignedBytes memory(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, bytes)));
  if (!memory) throw std::bad_alloc();
  ::madvise(memory.get(), bytes, MADV_HUGEPAGE);
  return memory;
}

// At most `count` buffers ever exist; they are made when first wanted.
class BufferPool {
 public:
  // A buffer that goes back by itself; without one it is false.
  class Loan {
   public:
    Loan() = default;
    Loan(BufferPool* pool, AlignedBytes buffer) : pool_(pool), buffer_(std::move(buffer)) {}
    Loan(Loan&&) = default;
    Loan& operator=(Loan&& other) noexcept {
      std::swap(pool_, other.pool_);
      std::swap(buffer_, other.buffer_);
      return *this;
    }
    ~Loan() {
      if (buffer_) pool_->put_back(std::move(buffer_));
    }
    explicit operator bool() const { return buffer_ != nullptr; }
    uint8_t* address() const { return buffer_.get(); }

   private:
    BufferPool* pool_ = nullptr;
    AlignedBytes buffer_;
  };

  BufferPool(size_t count, size_t bytes) : unmade_(count), bytes_(bytes) {}

  Loan try_take() {
    std::unique_lock lock(mutex_);
    return take_one(lock);
  }

  // Only for a caller that holds none, or two of them could wait for each other for ever. Without
  // one when the limits have passed: a device that hangs has the buffers then.
  Loan take(const Limits& limits) {
    std::unique_lock lock(mutex_);
    while (unmade_ == 0 && free_.empty()) {
      if (limits.passed()) return {};
      returned_.wait_for(lock, kGlance);  // nobody tells when a call is cancelled
    }
    return take_one(lock);
  }

 private:
  static constexpr std::chrono::milliseconds kGlance{5};

  Loan take_one(std::unique_lock<std::mutex>&) {
    if (!free_.empty()) {
      Loan loan(this, std::move(free_.back()));
      free_.pop_back();
      return loan;
    }
    if (unmade_ == 0) return {};
    Loan loan(this, huge_bytes(bytes_));
    --unmade_;
    return loan;
  }

  void put_back(AlignedBytes buffer) {
    {
      const std::lock_guard lock(mutex_);
      free_.push_back(std::move(buffer));
    }
    returned_.notify_one();
  }

  std::mutex mutex_;
  std::condition_variable returned_;
  std::vector<AlignedBytes> free_;
  size_t unmade_;
  const size_t bytes_;
};

}  // namespace lmcache::io
