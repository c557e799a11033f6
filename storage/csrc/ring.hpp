// An io_uring by its system calls alone, for one thread at a time.
#pragma once

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <span>
#include <system_error>
#include <thread>

#include "slot_file.hpp"

namespace lmcache::io {

// Memory shared with the kernel.
class SharedArea {
 public:
  SharedArea(int file, size_t bytes, uint64_t at)
      : bytes_(bytes),
        address_(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file,
                        static_cast<off_t>(at))) {
    if (address_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "io_uring");
  }
  ~SharedArea() { ::munmap(address_, bytes_); }
  SharedArea(const SharedArea&) = delete;
  SharedArea& operator=(const SharedArea&) = delete;

  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(address_) + offset);
  }

 private:
  const size_t bytes_;
  void* const address_;
};

class Ring {
 public:
  // Throws std::system_error where the kernel, or a filter of system calls, has none to give.
  explicit Ring(unsigned entries)
      : file_(set_up(entries, about_)),
        queue_(file_.number(), queue_bytes(about_), IORING_OFF_SQ_RING),
        entries_(file_.number(), about_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES) {
    try_out();
  }

  // At most as many may be in flight as there are entries. `vectors` stay until it is done.
  void push(Direction direction, int file, std::span<const iovec> vectors, uint64_t offset,
            uint64_t tag) {
    io_uring_sqe entry{};
    entry.opcode = direction == Direction::Read ? IORING_OP_READV : IORING_OP_WRITEV;
    entry.fd = file;
    entry.addr = reinterpret_cast<uint64_t>(vectors.data());
    entry.len = static_cast<uint32_t>(vectors.size());
    entry.off = offset;
    entry.user_data = tag;
    push(entry);
  }

  void submit() {
    while (unsubmitted_ > 0) enter(0);
  }

  // Calls `done(tag, result)` for what is done, at least one.
  template <typename Done>
  void reap(Done&& done) {
    while (ready() == 0) enter(1);
    for (unsigned left = ready(); left > 0; --left) {
      const unsigned head = *index(about_.cq_off.head);
      const io_uring_cqe entry =
          queue_.at<io_uring_cqe>(about_.cq_off.cqes)[head & *index(about_.cq_off.ring_mask)];
      release(about_.cq_off.head, head + 1);
      done(entry.user_data, entry.res);
    }
  }

 private:
  static Descriptor set_up(unsigned entries, io_uring_params& about) {
    const long file = ::syscall(SYS_io_uring_setup, entries, &about);
    if (file < 0) throw std::system_error(errno, std::generic_category(), "io_uring_setup");
    Descriptor descriptor(static_cast<int>(file));
    // Older kernels (before 5.4) map the two queues apart; threads serve those.
    if (!(about.features & IORING_FEAT_SINGLE_MMAP))
      throw std::system_error(ENOSYS, std::generic_category(), "io_uring_setup");
    return descriptor;
  }

  static size_t queue_bytes(const io_uring_params& about) {
    return std::max(about.sq_off.array + about.sq_entries * sizeof(unsigned),
                    about.cq_off.cqes + about.cq_entries * sizeof(io_uring_cqe));
  }

  // A filter may let the ring be made but not be used; later there would be no way back.
  void try_out() {
    io_uring_sqe entry{};
    entry.opcode = IORING_OP_NOP;
    push(entry);
    if (call(1) != 1) throw std::system_error(errno, std::generic_category(), "io_uring_enter");
    unsubmitted_ = 0;
    reap([](uint64_t, int) {});
  }

  void push(const io_uring_sqe& entry) {
    const unsigned tail = *index(about_.sq_off.tail);
    const unsigned place = tail & *index(about_.sq_off.ring_mask);
    entries_.at<io_uring_sqe>(0)[place] = entry;
    queue_.at<unsigned>(about_.sq_off.array)[place] = place;
    release(about_.sq_off.tail, tail + 1);
    ++unsubmitted_;
  }

  long call(unsigned wanted) {
    const unsigned flags = wanted > 0 ? IORING_ENTER_GETEVENTS : 0;
    return ::syscall(SYS_io_uring_enter, file_.number(), unsubmitted_, wanted, flags, nullptr, 0);
  }

  // The only errors left are passing ones: a signal, or the kernel is short of memory.
  void enter(unsigned wanted) {
    const long taken = call(wanted);
    if (taken >= 0)
      unsubmitted_ -= static_cast<unsigned>(taken);
    else if (errno != EINTR)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

  unsigned ready() const {
    const std::atomic_ref<unsigned> tail(*index(about_.cq_off.tail));
    return tail.load(std::memory_order_acquire) - *index(about_.cq_off.head);
  }

  unsigned* index(size_t offset) const { return queue_.at<unsigned>(offset); }

  void release(size_t offset, unsigned value) {
    std::atomic_ref(*index(offset)).store(value, std::memory_order_release);
  }

  io_uring_params about_{};
  const Descriptor file_;
  const SharedArea queue_;
  const SharedArea entries_;
  unsigned unsubmitted_ = 0;
};

}  // namespace lmcache::io
