// Takes the frames that come for one `Get`, in any order, into the pages they belong to.
//
// A peer is believed in nothing: each frame is held against what was asked before a byte of it is
// written, and a page's checksum is computed while it is copied. So whatever comes, only memory of
// the pages asked for is written, each frame of a page at most once, and never after the page is
// settled.
//
// A frame that continues the page begun last is hashed as it is copied, which is how servers send
// them. What came out of order is hashed where it lies, once its page is complete.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
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
  Corrupt,    // a page whose bytes are not those of its checksum, or that was given two: it is lost
  NotUnderstood,
  Foreign,    // of another request
  Misplaced,  // no such page, or no frame begins there
  WrongLength,
  Repeated,
  Settled,  // of pages of which all is known
};

inline bool is_useful(Verdict verdict) { return verdict <= Verdict::Without; }

// Calls with each part of the page's memory from `offset` on, for `bytes` of it.
template <class Visit>
void for_parts_of(std::span<const Segment> page, uint64_t offset, uint64_t bytes,
                  const Visit& visit) {
  for (const Segment& segment : page) {
    if (bytes == 0) return;
    if (offset >= segment.bytes) {
      offset -= segment.bytes;
      continue;
    }
    const size_t n = std::min<uint64_t>(bytes, segment.bytes - offset);
    visit(segment.address + offset, n);
    bytes -= n;
    offset = 0;
  }
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
      const Came came = count == 0 ? Came::Hit : Came::Waiting;
      pages_.push_back({page, bytes, frames, count, count, 0, came});
      frames += count;
      bytes_ += bytes;
      waiting_ += count != 0;
    }
    taken_.resize(frames);
  }

  FrameAcceptor(const FrameAcceptor&) = delete;
  FrameAcceptor& operator=(const FrameAcceptor&) = delete;

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
    uint64_t frames;
    uint64_t lacking;   // frames
    uint64_t checksum;  // as its first frame told
    Came came;
  };

  Verdict place(Page& page, uint64_t offset, uint64_t checksum, std::span<const uint8_t> payload) {
    if (offset % frame_ != 0 || offset >= page.bytes) return Verdict::Misplaced;
    if (payload.size() != std::min(frame_, page.bytes - offset)) return Verdict::WrongLength;
    if (page.came != Came::Waiting) return Verdict::Settled;
    const uint64_t at = page.first_frame + offset / frame_;
    if (taken_[at]) return Verdict::Repeated;
    taken_[at] = true;
    if (page.lacking == page.frames) page.checksum = checksum;
    if (page.checksum != checksum) return lose(page);
    copy(page, offset, payload);
    if (--page.lacking > 0) return Verdict::Taken;
    if (hash_of(page) != page.checksum) return lose(page);
    settle(page, Came::Hit);
    return Verdict::Completed;
  }

  Verdict lose(Page& page) {
    settle(page, Came::Corrupt);
    return Verdict::Corrupt;
  }

  void copy(const Page& page, uint64_t offset, std::span<const uint8_t> payload) {
    if (offset == 0) begin(page);
    const bool continues = running_ == &page && offset == hashed_;
    const uint8_t* from = payload.data();
    for_parts_of(page.wanted.memory, offset, payload.size(), [&](uint8_t* to, size_t n) {
      if (continues)
        hash_->copy(to, from, n);
      else
        std::memcpy(to, from, n);
      from += n;
    });
    if (continues) hashed_ += payload.size();
  }

  // What comes of this page from its first byte on is hashed; of no other page at the same time.
  void begin(const Page& page) {
    hash_.emplace(page.wanted.seed, page.bytes);
    running_ = &page;
    hashed_ = 0;
  }

  uint64_t hash_of(const Page& page) {
    if (running_ != &page) begin(page);
    running_ = nullptr;
    for_parts_of(page.wanted.memory, hashed_, page.bytes - hashed_,
                 [&](const uint8_t* at, size_t n) { hash_->read(at, n); });
    return hash_->finish();
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
  std::optional<HashingCopy> hash_;
  const Page* running_ = nullptr;  // the page that it is of
  uint64_t hashed_ = 0;            // bytes of that page
  uint64_t bytes_ = 0;
  size_t waiting_ = 0;  // pages
};

}  // namespace lmcache
