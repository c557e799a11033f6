// Takes the frames that come for one `Get`, in any order, into the pages they belong to.
//
// A peer is believed in nothing: each frame is held against what was asked before a byte of it is
// written, and its checksum is computed while it is copied. So whatever comes, only memory of the
// pages asked for is written, each frame of a page at most once, and never after the page is
// settled.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "../../kernels/csrc/pages.hpp"
#include "wire.hpp"

namespace lmcache {

// What became of a page. peers/fetch.py has the same numbers, and says what they mean.
enum class Came : uint8_t {
  Unasked,
  Waiting,
  Hit,
  Absent,
  Busy,
  Failed,
  Leaving,
  Corrupt,
  Distrusted,
  Stalled,
  Late,
  Cancelled,
  Broken,
};

// What was made of a message. The first three bring the request further.
enum class Verdict : uint8_t {
  Taken,      // a frame, whole and right
  Completed,  // the last frame that its page lacked
  Without,    // pages that do not come
  Corrupt,    // a frame whose bytes are not those of its checksum: the page is lost
  NotUnderstood,
  Foreign,    // of another request
  Misplaced,  // no such page, or no frame begins there
  WrongLength,
  Repeated,
  Settled,  // of pages of which all is known
};

inline bool is_useful(Verdict verdict) { return verdict <= Verdict::Without; }

// Copies a piece of a page to its place; returns the checksum of what the page holds there.
inline uint64_t scatter_at(std::span<const uint8_t> piece, uint64_t offset,
                           std::span<const Segment> page, uint64_t seed) {
  HashingCopy out(seed, piece.size());
  for (const Segment& segment : page) {
    if (piece.empty()) break;
    if (offset >= segment.bytes) {
      offset -= segment.bytes;
      continue;
    }
    const size_t n = std::min<size_t>(piece.size(), segment.bytes - offset);
    out.copy(segment.address + offset, piece.data(), n);
    piece = piece.subspan(n);
    offset = 0;
  }
  return out.finish();
}

// A page that was asked for. `memory` must stay valid.
struct WantedPage {
  std::span<const Segment> memory;
  uint64_t seed;  // of its checksum
};

class FrameAcceptor {
 public:
  // `frame` is not 0. A page without bytes is a hit at once.
  FrameAcceptor(uint64_t request, std::span<const WantedPage> wanted, uint64_t frame)
      : request_(request), frame_(frame) {
    uint64_t frames = 0;
    for (const WantedPage& page : wanted) {
      const uint64_t bytes = bytes_of(page.memory);
      const uint64_t count = bytes / frame + (bytes % frame != 0);
      pages_.push_back({page, bytes, frames, count, count == 0 ? Came::Hit : Came::Waiting});
      frames += count;
      bytes_ += bytes;
      waiting_ += count != 0;
    }
    taken_.resize(frames);
  }

  bool all_settled() const { return waiting_ == 0; }
  uint64_t bytes() const { return bytes_; }  // of all pages
  size_t size() const { return pages_.size(); }
  Came came(size_t page) const { return pages_[page].came; }

  // Nothing more is taken; pages that are not settled become `came`.
  void give_up(Came came) {
    for (Page& page : pages_)
      if (page.came == Came::Waiting) settle(page, came);
  }

  // A message of two parts.
  Verdict accept(std::span<const uint8_t> body, std::span<const uint8_t> payload) {
    const auto numbers = wire::numbers_of(body);
    if (!numbers) return Verdict::NotUnderstood;
    const auto [kind, request, number, offset, checksum] = *numbers;
    if (kind != wire::kPage) return Verdict::NotUnderstood;
    if (request != request_) return Verdict::Foreign;
    if (number >= pages_.size()) return Verdict::Misplaced;
    return place(pages_[number], offset, checksum, payload);
  }

  // A message of one part.
  Verdict accept(std::span<const uint8_t> body) {
    const auto numbers = wire::numbers_of(body);
    if (!numbers) return Verdict::NotUnderstood;
    const auto [kind, request, first, count, why] = *numbers;
    if (kind != wire::kWithout) return Verdict::NotUnderstood;
    if (request != request_) return Verdict::Foreign;
    if (first >= pages_.size() || count == 0 || count > pages_.size() - first)
      return Verdict::Misplaced;
    return do_without(std::span(pages_).subspan(first, count), why);
  }

 private:
  struct Page {
    WantedPage wanted;
    uint64_t bytes;
    uint64_t first_frame;  // its place in taken_
    uint64_t lacking;      // frames
    Came came;
  };

  Verdict place(Page& page, uint64_t offset, uint64_t checksum, std::span<const uint8_t> payload) {
    if (offset % frame_ != 0 || offset >= page.bytes) return Verdict::Misplaced;
    if (payload.size() != std::min(frame_, page.bytes - offset)) return Verdict::WrongLength;
    if (page.came != Came::Waiting) return Verdict::Settled;
    const uint64_t at = page.first_frame + offset / frame_;
    if (taken_[at]) return Verdict::Repeated;
    taken_[at] = true;
    if (scatter_at(payload, offset, page.wanted.memory, page.wanted.seed + offset) != checksum) {
      settle(page, Came::Corrupt);
      return Verdict::Corrupt;
    }
    if (--page.lacking > 0) return Verdict::Taken;
    settle(page, Came::Hit);
    return Verdict::Completed;
  }

  Verdict do_without(std::span<Page> pages, uint64_t why) {
    constexpr Came kReasons[] = {Came::Absent, Came::Busy, Came::Failed, Came::Leaving};
    const Came came = why < std::size(kReasons) ? kReasons[why] : Came::Failed;
    Verdict verdict = Verdict::Settled;
    for (Page& page : pages) {
      if (page.came != Came::Waiting) continue;
      settle(page, came);
      verdict = Verdict::Without;
    }
    return verdict;
  }

  void settle(Page& page, Came came) {
    page.came = came;
    --waiting_;
  }

  const uint64_t request_;
  const uint64_t frame_;
  std::vector<Page> pages_;
  std::vector<bool> taken_;  // by frame, page after page
  uint64_t bytes_ = 0;
  size_t waiting_ = 0;  // pages
};

}  // namespace lmcache
