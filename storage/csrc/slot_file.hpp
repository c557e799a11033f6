// The file of slots: opened for direct I/O where it takes that, else for buffered I/O.
#pragma once

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "transfer.hpp"

namespace lmcache::io {

class Descriptor {
 public:
  Descriptor() = default;
  Descriptor(const std::string& path, int flags) : number_(::open(path.c_str(), flags)) {}
  explicit Descriptor(int number) : number_(number) {}
  ~Descriptor() {
    if (number_ >= 0) ::close(number_);
  }
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }

  explicit operator bool() const { return number_ >= 0; }
  int number() const { return number_; }

 private:
  int number_ = -1;
};

// What direct I/O asks of a segment: its address, its length and its place in the file are
// multiples.
struct Alignment {
  uint64_t memory;
  uint64_t length;
};

struct Moved {
  uint64_t bytes;
  int error;  // errno that ended it before its time, or 0
};

struct Range {
  uint64_t begin, end;
};

struct FreeBytes {
  void operator()(uint8_t* bytes) const { std::free(bytes); }
};
using AlignedBytes = std::unique_ptr<uint8_t, FreeBytes>;

inline AlignedBytes aligned_bytes(size_t bytes) {
  AlignedBytes memory(static_cast<uint8_t*>(std::aligned_alloc(kBlock, bytes)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

class SlotFile {
 public:
  SlotFile(const std::string& path, bool direct) : buffered_(path, O_RDWR | O_CLOEXEC) {
    struct stat about;
    if (!buffered_ || ::fstat(buffered_.number(), &about) != 0)
      throw std::system_error(errno, std::generic_category(), path);
    bytes_ = static_cast<uint64_t>(about.st_size);
    why_not_ = direct ? open_direct(path) : "not asked for";
    is_direct_ = why_not_.empty();
  }

  uint64_t bytes() const { return bytes_; }
  bool direct() const { return is_direct_.load(std::memory_order_relaxed); }
  Alignment alignment() const { return direct() ? alignment_ : Alignment{1, 1}; }
  int descriptor() const { return (direct() ? direct_ : buffered_).number(); }

  // Where the first `enough` bytes lie that were ever written, or an empty range: allocated space
  // that was not written is read without the device.
  Range written(uint64_t enough) const {
    constexpr unsigned kMostRuns = 4096;  // some milliseconds
    Range range{0, 0};
    uint64_t found = 0;
    for (unsigned run = 0; run < kMostRuns && found < enough; ++run) {
      const off_t begin = ::lseek(buffered_.number(), static_cast<off_t>(range.end), SEEK_DATA);
      const off_t end = begin < 0 ? begin : ::lseek(buffered_.number(), begin, SEEK_HOLE);
      if (end <= begin) break;
      if (found == 0) range.begin = static_cast<uint64_t>(begin);
      range.end = static_cast<uint64_t>(end);
      found += static_cast<uint64_t>(end - begin);
    }
    return found < enough ? Range{0, 0} : range;
  }

  std::string why_not_direct() const {
    const std::lock_guard lock(mutex_);
    return why_not_;
  }

  int flush() {
    while (::fdatasync(buffered_.number()) != 0)
      if (errno != EINTR) return errno;
    return 0;
  }

  // Goes on after short transfers until all is moved, an error comes, or the file ends (EIO).
  // `vectors` are used up.
  Moved move(Direction direction, std::span<iovec> vectors, uint64_t offset, const Limits& limits) {
    Moved moved{0, 0};
    int file = descriptor();
    bool refused = false;
    while (!vectors.empty()) {
      // The file ends inside a block, and direct I/O does not begin inside one.
      if ((offset + moved.bytes) % alignment_.length != 0) file = buffered_.number();
      const ssize_t n = once(file, direction, vectors, offset + moved.bytes);
      if (n > 0) {
        if (refused) stop_direct("a transfer with O_DIRECT was refused: Invalid argument");
        moved.bytes += static_cast<uint64_t>(n);
        vectors = after(vectors, static_cast<size_t>(n));
        continue;
      }
      const int error = n == 0 ? EIO : errno;
      if (n < 0 && may_retry(error, limits)) continue;
      if (n == 0 || file == buffered_.number() || (error != EINVAL && error != EFAULT)) {
        moved.error = error == EAGAIN ? ECANCELED : error;
        return moved;
      }
      // This file takes no direct I/O after all (EINVAL), or this memory none (EFAULT).
      refused = error == EINVAL;
      file = buffered_.number();
    }
    return moved;
  }

  static std::span<iovec> after(std::span<iovec> vectors, size_t moved) {
    while (!vectors.empty() && moved >= vectors.front().iov_len) {
      moved -= vectors.front().iov_len;
      vectors = vectors.subspan(1);
    }
    if (!vectors.empty()) {
      vectors.front().iov_base = static_cast<uint8_t*>(vectors.front().iov_base) + moved;
      vectors.front().iov_len -= moved;
    }
    return vectors;
  }

 private:
  static ssize_t once(int file, Direction direction, std::span<const iovec> vectors, uint64_t at) {
    const auto call = direction == Direction::Read ? ::preadv : ::pwritev;
    return call(file, vectors.data(), static_cast<int>(vectors.size()), static_cast<off_t>(at));
  }

  static bool may_retry(int error, const Limits& limits) {
    if (error == EINTR) return true;
    if (error != EAGAIN || limits.passed()) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return true;
  }

  // Returns why not, or nothing.
  std::string open_direct(const std::string& path) {
    struct statfs system;
    if (::fstatfs(buffered_.number(), &system) == 0 && system.f_type == TMPFS_MAGIC)
      return "its file system, tmpfs, lies in memory";
    direct_ = Descriptor(path, O_RDWR | O_CLOEXEC | O_DIRECT);
    if (!direct_) return "open with O_DIRECT: " + std::generic_category().message(errno);
    int error = EINVAL;
    for (const Alignment& candidate : candidates()) {
      alignment_ = candidate;
      error = candidate.length > kBlock ? EINVAL : try_read(candidate);
      if (error == 0) return "";
    }
    alignment_ = {1, 1};
    return "a first read with O_DIRECT: " + std::generic_category().message(error);
  }

  // Loosest first. Empty when the kernel says that the file takes none.
  std::vector<Alignment> candidates() const {
#ifdef STATX_DIOALIGN
    struct statx about;
    if (::statx(direct_.number(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &about) == 0 &&
        (about.stx_mask & STATX_DIOALIGN)) {
      const uint64_t memory = about.stx_dio_mem_align;
      const uint64_t length = about.stx_dio_offset_align;
      if (memory == 0 || length == 0) return {};
      return {{memory, std::max(memory, length)}};
    }
#endif
    return {{512, 512}, {512, kBlock}, {kBlock, kBlock}};
  }

  // The memory is aligned as the candidate says, and no better.
  int try_read(const Alignment& candidate) const {
    const AlignedBytes memory = aligned_bytes(4 * kBlock);
    const ssize_t n = ::pread(direct_.number(), memory.get() + candidate.memory, candidate.length,
                              static_cast<off_t>(candidate.length));
    return n < 0 ? errno : 0;
  }

  void stop_direct(const char* why) {
    const std::lock_guard lock(mutex_);
    if (is_direct_.exchange(false)) why_not_ = why;
  }

  Descriptor buffered_;
  Descriptor direct_;
  uint64_t bytes_ = 0;
  Alignment alignment_{1, 1};
  std::atomic<bool> is_direct_ = false;
  mutable std::mutex mutex_;
  std::string why_not_;
};

}  // namespace lmcache::io
