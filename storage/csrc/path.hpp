// Whether pages that fit direct I/O move straight, or through buffers on huge pages.
//
// A virtual disk may take a page that lies on 512 small pages of memory in 512 pieces; there the
// copy is worth its while (2.4 times the speed, measured). A disk of metal hardly cares, and there
// the copy would only cost processor time. So it is measured, on bytes that were written, since
// those that were not are read without the device.
#pragma once

#include <atomic>
#include <chrono>

#include "device.hpp"
#include "engines.hpp"

namespace lmcache::io {

class Path {
 public:
  explicit Path(DeviceOptions::Path wanted)
      : through_buffers_(wanted == DeviceOptions::Path::Buffers),
        decided_(wanted != DeviceOptions::Path::Auto) {}

  bool through_buffers() const { return through_buffers_.load(std::memory_order_relaxed); }

  // Before a read. Looks whether there is enough to measure by, once when the file is opened and
  // then each time as much has been written.
  void decide(SlotFile& file, BufferPool& buffers, unsigned depth, Engines& engines,
              const Limits& limits) {
    if (decided_.load(std::memory_order_relaxed) || !has_time(limits)) return;
    if (unseen_.load(std::memory_order_relaxed) < Probe::kLeastBytes) return;
    unseen_.store(0, std::memory_order_relaxed);
    const Range range = file.written(Probe::kLeastBytes);
    if (range.begin == range.end || decided_.exchange(true)) return;
    Engine& engine = engines.current();
    Probe probe(file, buffers, depth, range);
    through_buffers_ = file.direct() && probe.is_faster({engine, true}, {engine, false});
    engines.decide(file, buffers, depth, range, through_buffers_);
  }

  void wrote(uint64_t bytes) {
    if (!decided_.load(std::memory_order_relaxed))
      unseen_.fetch_add(bytes, std::memory_order_relaxed);
  }

 private:
  static bool has_time(const Limits& limits) {
    return limits.deadline - std::chrono::steady_clock::now() > 4 * Probe::kLongest;
  }

  std::atomic<bool> through_buffers_;
  std::atomic<bool> decided_;
  std::atomic<uint64_t> unseen_ = Probe::kLeastBytes;  // written since the last look
};

}  // namespace lmcache::io
