// How a batch of pages becomes requests: neighbours are joined, large pages are split.
#pragma once

#include <limits.h>

#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "slot_file.hpp"
#include "split_page.hpp"
#include "transfer.hpp"

namespace lmcache::io {

// A page's share of a request. Its bytes before `straight` move from or into their own memory,
// those behind it through the request's buffer, as does the padding up to the next block.
struct Part {
  Transfer* page;
  SplitPage* split;  // none for a page in one piece
  size_t piece;
  uint64_t from, straight, to;  // bytes of the page

  uint64_t offset() const { return page->offset + from; }
  uint64_t extent() const { return whole_blocks(to) - from; }
  bool needs_buffer() const { return straight < whole_blocks(to); }
};

// A range of the file that moves in one call.
struct Request {
  uint64_t bytes;
  size_t first_part, parts;
  size_t vectors;  // at most
  bool needs_buffer;
};

struct Plan {
  std::vector<Part> parts;
  std::vector<Request> requests;
  std::deque<SplitPage> splits;
};

class Planner {
 public:
  // No request is longer than `limit`, a multiple of kBlock. Without an alignment nothing moves
  // straight.
  Planner(const std::optional<Alignment>& alignment, uint64_t limit)
      : alignment_(alignment), limit_(limit) {}

  Plan plan(std::span<Transfer> batch) {
    plan_.parts.reserve(batch.size());
    for (Transfer& page : batch) add(page);
    return std::move(plan_);
  }

 private:
  void add(Transfer& page) {
    const uint64_t straight = straight_bytes(page);
    if (page.bytes <= limit_) {
      if (page.bytes > 0) append({&page, nullptr, 0, 0, straight, page.bytes});
      return;
    }
    SplitPage& split = plan_.splits.emplace_back(page, limit_);
    for (uint64_t from = 0, piece = 0; from < page.bytes; from += limit_, ++piece) {
      const uint64_t to = std::min(from + limit_, page.bytes);
      append({&page, &split, piece, from, std::clamp(straight, from, to), to});
    }
  }

  // All of the page or nothing, but for a last bit that fills no block of the device.
  uint64_t straight_bytes(const Transfer& page) const {
    if (!alignment_ || crumbled(page)) return 0;
    for (const Segment& segment : page.page) {
      if (reinterpret_cast<uintptr_t>(segment.address) % alignment_->memory != 0) return 0;
      if (&segment != &page.page.back() && segment.bytes % alignment_->length != 0) return 0;
    }
    return page.bytes - page.bytes % alignment_->length;
  }

  // A copy costs less than so many small transfers: 256 KiB in segments of 2 KiB are read at 1.2
  // GB/s straight and at 2.5 through a buffer, in segments of 4 KiB about equally fast.
  static bool crumbled(const Transfer& page) {
    return page.page.size() >= IOV_MAX ||
           (page.page.size() > 1 && page.bytes / page.page.size() < kBlock);
  }

  void append(const Part& part) {
    const size_t vectors = (part.straight > part.from ? part.page->page.size() : 0) + 1;
    plan_.parts.push_back(part);
    if (joins(part, vectors)) {
      Request& last = plan_.requests.back();
      last.bytes += part.extent();
      last.parts += 1;
      last.vectors += vectors;
      last.needs_buffer |= part.needs_buffer();
    } else {
      plan_.requests.push_back(
          {part.extent(), plan_.parts.size() - 1, 1, vectors, part.needs_buffer()});
    }
  }

  bool joins(const Part& part, size_t vectors) const {
    if (plan_.requests.empty() || part.split) return false;
    const Request& last = plan_.requests.back();
    const Part& first = plan_.parts[last.first_part];
    return !first.split && first.offset() + last.bytes == part.offset() &&
           last.bytes + part.extent() <= limit_ && last.vectors + vectors <= IOV_MAX;
  }

  const std::optional<Alignment> alignment_;
  const uint64_t limit_;
  Plan plan_;
};

}  // namespace lmcache::io
