// Which way is faster on this very file: measured by a few reads.
#pragma once

#include <algorithm>
#include <chrono>
#include <optional>
#include <vector>

#include "engine.hpp"

namespace lmcache::io {

struct Way {
  Engine& engine;
  bool through_buffers;
};

class Probe {
 public:
  static constexpr std::chrono::milliseconds kLongest{40};
  static constexpr uint64_t kLeastBytes = 64 << 20;

  // Reads in that range of the file, of kLeastBytes at least.
  Probe(SlotFile& file, BufferPool& buffers, unsigned depth, const Range& range)
      : file_(file),
        buffers_(buffers),
        depth_(depth),
        range_(range),
        memory_(aligned_bytes(kPages * kPageBytes)) {
    limits_.deadline = std::chrono::steady_clock::now() + kLongest;
  }

  // Round by round, in turns, so that what else the machine does in the meantime hits both. Where
  // the two are equal, chance decides a round, but hardly all of them but one.
  bool is_faster(const Way& candidate, const Way& incumbent) {
    seconds(candidate);  // the first reads pay for threads and caches
    seconds(incumbent);
    unsigned lost = 0;
    for (unsigned round = 0; round < kRounds && lost < 2; ++round) {
      const auto theirs = seconds(incumbent), ours = seconds(candidate);
      if (!ours || !theirs) return false;
      if (*ours * kGain > *theirs) ++lost;
    }
    return lost < 2;
  }

 private:
  static constexpr double kGain = 1.1;
  static constexpr unsigned kRounds = 5;
  static constexpr uint64_t kPages = 12;
  static constexpr uint64_t kPageBytes = 256 << 10;

  // Nothing when the time was over or a read failed.
  std::optional<double> seconds(const Way& way) {
    std::vector<Segment> segments(kPages);
    std::vector<Transfer> pages(kPages);
    for (uint64_t i = 0; i < kPages; ++i) {
      segments[i] = {memory_.get() + i * kPageBytes, kPageBytes};
      pages[i] = {place(i), kPageBytes, {&segments[i], 1}, 0};
    }
    ++run_;
    const auto start = std::chrono::steady_clock::now();
    Batch batch(file_, buffers_, Direction::Read, pages, limits_, {depth_, way.through_buffers});
    way.engine.run(batch);
    batch.conclude();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    const bool whole = std::ranges::all_of(pages, [](const Transfer& p) { return p.error == 0; });
    return whole ? std::optional(took.count()) : std::nullopt;
  }

  // Spread over the range: no two are neighbours, and no run reads what another has read.
  uint64_t place(uint64_t page) const {
    constexpr uint64_t kRuns = 2 * kRounds + 2;
    const uint64_t stride = (range_.end - range_.begin) / (kPages * kRuns);
    return whole_blocks(range_.begin) + (page * kRuns + run_) * stride / kBlock * kBlock;
  }

  SlotFile& file_;
  BufferPool& buffers_;
  const unsigned depth_;
  const Range range_;
  const AlignedBytes memory_;
  Limits limits_;
  uint64_t run_ = 0;
};

}  // namespace lmcache::io
