#include "medium.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <system_error>
#include <thread>

#include "../../kernels/csrc/workers.hpp"
#include "pinning.hpp"
#include "steps.hpp"

namespace lmcache {

namespace {

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // of Linux; older C libraries do not name it
#endif

constexpr uint64_t kMappedAtOnce = 16 << 20;

class MemoryMedium : public Medium {
 public:
  MemoryMedium(const std::string& path, uint64_t bytes, unsigned threads, bool huge_pages)
      : bytes_(bytes), workers_(threads) {
    const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (file < 0) throw std::system_error(errno, std::generic_category(), path);
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    const int error = errno;
    close(file);
    if (base == MAP_FAILED) throw std::system_error(error, std::generic_category(), path);
    base_ = static_cast<uint8_t*>(base);
    huge_ = huge_pages && madvise(base_, bytes, MADV_HUGEPAGE) == 0;
    mapper_ = std::thread([this] { map_ahead(); });
  }
  ~MemoryMedium() override {
    closing_ = true;
    mapper_.join();
    pinned_.reset();  // before the range goes
    munmap(base_, bytes_);
  }

  void read(std::span<Transfer> pages, const Limits& limits) override {
    each(pages, limits, Step::Read,
         [this](Transfer& t) { t.checksum = scatter(base_ + t.offset, t.page, t.seed); });
  }
  void write(std::span<Transfer> pages, const Limits& limits) override {
    each(pages, limits, Step::Write,
         [this](Transfer& t) { t.checksum = gather(t.page, base_ + t.offset, t.seed); });
  }
  int flush() override { return 0; }
  const uint8_t* address(uint64_t offset) const override { return base_ + offset; }
  std::string describe() const override { return huge_ ? "memory, huge pages" : "memory"; }

  std::string pin(const std::string& driver) override {
    const std::lock_guard guard(pin_lock_);
    if (!pinned_ || !pinned_->why_not().empty())
      pinned_ = std::make_unique<Pinned>(base_, bytes_, driver);
    return pinned_->why_not();
  }

 private:
  // The pages are there, but each process finds them by a fault of its own: 5 GB/s the first time
  // round where 35 are possible. So they are all mapped now, in the background. A kernel
  // before 5.14 cannot.
  void map_ahead() {
    for (uint64_t at = 0; at < bytes_ && !closing_; at += kMappedAtOnce)
      if (madvise(base_ + at, std::min(kMappedAtOnce, bytes_ - at), MADV_POPULATE_WRITE) != 0)
        return;
  }

  template <class Move>
  void each(std::span<Transfer> pages, const Limits& limits, Step kind, const Move& move) {
    workers_.run(pages.size(), [&](size_t i) {
      Transfer& page = pages[i];
      page.error = limits.passed() ? ECANCELED : step(kind, page.offset, page.bytes);
      if (page.error == 0 && page.offset + page.bytes > bytes_) page.error = EIO;
      if (page.error == 0) move(page);
    });
  }

  uint64_t bytes_;
  uint8_t* base_;
  bool huge_ = false;
  Workers workers_;
  std::atomic<bool> closing_{false};
  std::thread mapper_;
  std::mutex pin_lock_;
  std::unique_ptr<Pinned> pinned_;
};

class FileMedium : public Medium {
 public:
  FileMedium(const std::string& path, const DeviceOptions& options) : device_(path, options) {}
  void read(std::span<Transfer> pages, const Limits& limits) override {
    device_.read(pages, limits);
  }
  void write(std::span<Transfer> pages, const Limits& limits) override {
    device_.write(pages, limits);
  }
  int flush() override { return device_.flush(); }
  const uint8_t* address(uint64_t) const override { return nullptr; }
  std::string pin(const std::string&) override { return "it is no memory"; }
  std::string describe() const override {
    const std::string how = device_.direct() ? "direct" : "buffered: " + device_.why_not_direct();
    return std::string(device_.engine()) + ", " + how;
  }

 private:
  Device device_;
};

class NoMedium : public Medium {
 public:
  void read(std::span<Transfer> pages, const Limits&) override {
    for (Transfer& page : pages) page.error = EIO;
  }
  void write(std::span<Transfer> pages, const Limits&) override {
    for (Transfer& page : pages) page.checksum = checksum(page.page, page.seed);
  }
  int flush() override { return 0; }
  const uint8_t* address(uint64_t) const override { return nullptr; }
  std::string pin(const std::string&) override { return "it is no memory"; }
  std::string describe() const override { return "nothing"; }
};

}  // namespace

std::unique_ptr<Medium> no_medium() { return std::make_unique<NoMedium>(); }

std::unique_ptr<Medium> memory_medium(const std::string& path, uint64_t bytes, unsigned threads,
                                      bool huge_pages) {
  return std::make_unique<MemoryMedium>(path, bytes, threads, huge_pages);
}

std::unique_ptr<Medium> file_medium(const std::string& path, const DeviceOptions& options) {
  return std::make_unique<FileMedium>(path, options);
}

}  // namespace lmcache
