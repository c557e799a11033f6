// One call of Device::read or Device::write: what each request of it does, whichever engine runs
// it.
#pragma once

#include <sys/uio.h>

#include <new>
#include <span>
#include <vector>

#include "buffers.hpp"
#include "plan.hpp"
#include "steps.hpp"

namespace lmcache::io {

inline constexpr uint64_t kLongestRequest = 2 << 20;
inline constexpr uint64_t kShortestSplit = 256 << 10;
inline constexpr uint64_t kHashedAtOnce = 16 << 10;  // stays in the first-level cache for the copy

// A request on its way. Its buffer mirrors its range of the file, so that a byte's place in one is
// its place in the other.
class Flight {
 public:
  Flight(std::span<const Part> parts, uint8_t* buffer) : parts(parts), buffer(buffer) {
    uint64_t at = 0;
    for (const Part& part : parts) {
      for_each_slice(part.page->page, part.from, part.straight,
                     [this](uint8_t* address, uint64_t bytes) { append(address, bytes); });
      const uint64_t behind = part.straight - part.from;
      if (part.needs_buffer()) append(buffer + at + behind, part.extent() - behind);
      at += part.extent();
    }
    bytes = at;
  }

  uint64_t offset() const { return parts.front().offset(); }

  std::span<const Part> parts;
  uint8_t* buffer;
  uint64_t bytes = 0;
  std::vector<iovec> vectors;

 private:
  void append(uint8_t* address, uint64_t bytes) {
    if (!vectors.empty()) {
      iovec& last = vectors.back();
      if (static_cast<uint8_t*>(last.iov_base) + last.iov_len == address) {
        last.iov_len += bytes;
        return;
      }
    }
    vectors.push_back({address, bytes});
  }
};

struct Manner {
  unsigned depth;        // requests that are in flight at once
  bool through_buffers;  // direct I/O never touches the caller's memory
};

class Batch {
 public:
  Batch(SlotFile& file, BufferPool& buffers, Direction direction, std::span<Transfer> pages,
        const Limits& limits, const Manner& manner)
      : file_(file),
        buffers_(buffers),
        direction_(direction),
        limits_(limits),
        plan_(Planner(alignment(file, manner), request_limit(pages, manner.depth)).plan(pages)) {
    for (Transfer& page : pages) {
      page.error = 0;
      page.checksum = page.bytes ? 0 : Xxh3(page.seed).digest();
    }
  }

  size_t size() const { return plan_.requests.size(); }
  const Request& operator[](size_t request) const { return plan_.requests[request]; }
  Direction direction() const { return direction_; }
  int descriptor() const { return file_.descriptor(); }
  BufferPool& buffers() { return buffers_; }
  const Limits& limits() const { return limits_; }
  bool passed() const { return limits_.passed(); }

  Flight flight(size_t request, uint8_t* buffer) const {
    return {std::span(plan_.parts)
                .subspan(plan_.requests[request].first_part, plan_.requests[request].parts),
            buffer};
  }

  // A request from begin to end, in this thread.
  void perform(size_t request) noexcept {
    try {
      const bool needs = plan_.requests[request].needs_buffer;
      const auto loan = needs ? buffers_.take(limits_) : BufferPool::Loan();
      if (needs && !loan) return fail(request, ECANCELED);
      Flight all = flight(request, loan.address());
      carry(all);
    } catch (const std::bad_alloc&) {
      fail(request, ENOMEM);
    }
  }

  void fail(size_t request, int error) {
    const Request& lost = plan_.requests[request];
    for (size_t i = 0; i < lost.parts; ++i) fail(plan_.parts[lost.first_part + i], error);
  }

  // Everything that comes before the I/O; an errno when there shall be none.
  int begin(const Flight& flight) {
    if (passed()) return ECANCELED;
    const SplitPage* split = flight.parts.front().split;
    if (const int error = split ? split->error() : 0) return error;
    const Step kind = direction_ == Direction::Read ? Step::Read : Step::Write;
    if (const int error = step(kind, flight.offset(), flight.bytes)) return error;
    if (direction_ == Direction::Write) absorb(flight.parts, flight.buffer);
    return 0;
  }

  Moved move(std::span<iovec> vectors, uint64_t offset) {
    return file_.move(direction_, vectors, offset, limits_);
  }

  // Everything that comes after the I/O. When one of several pages has failed, those that did not
  // come through go again one by one: one bad page is no reason to fail its neighbours.
  void settle(const Flight& flight, const Moved& moved) noexcept {
    uint64_t at = 0;
    for (const Part& part : flight.parts) {
      uint8_t* buffer = flight.buffer ? flight.buffer + at : nullptr;
      if (at + (part.to - part.from) <= moved.bytes) {
        if (direction_ == Direction::Read) absorb({&part, 1}, buffer);
      } else if (flight.parts.size() > 1 && moved.error != ECANCELED) {
        carry_alone(part, buffer);
      } else {
        fail(part, moved.error);
      }
      at += part.extent();
    }
  }

  // Once nothing is in flight any more.
  void conclude() {
    for (SplitPage& split : plan_.splits) split.conclude();
  }

 private:
  // Buffered I/O copies anyway, so there nothing is gained by a buffer of ours.
  static std::optional<Alignment> alignment(const SlotFile& file, const Manner& manner) {
    if (manner.through_buffers && file.direct()) return std::nullopt;
    return file.alignment();
  }

  // A small batch is cut finer, so that it too keeps the device busy.
  static uint64_t request_limit(std::span<const Transfer> pages, unsigned depth) {
    uint64_t total = 0;
    for (const Transfer& page : pages) total += page.bytes;
    return std::clamp(whole_blocks(total / depth), kShortestSplit, kLongestRequest);
  }

  void carry(Flight& flight) {
    const int error = begin(flight);
    settle(flight, error ? Moved{0, error} : move(flight.vectors, flight.offset()));
  }

  void carry_alone(const Part& part, uint8_t* buffer) {
    try {
      Flight alone({&part, 1}, buffer);
      carry(alone);
    } catch (const std::bad_alloc&) {
      fail(part, ENOMEM);
    }
  }

  void absorb(std::span<const Part> parts, uint8_t* buffer) {
    for (const Part& part : parts) {
      if (part.split) {
        part.split->absorb(part.piece, [&](Xxh3* hash) { bring(part, buffer, hash); });
      } else {
        Xxh3 hash(part.page->seed);
        bring(part, buffer, &hash);
        part.page->checksum = hash.digest();
      }
      if (buffer) buffer += part.extent();
    }
  }

  // Copies what goes through the buffer and hashes everything, in one pass.
  void bring(const Part& part, uint8_t* buffer, Xxh3* hash) const {
    if (hash)
      for_each_slice(part.page->page, part.from, part.straight,
                     [hash](uint8_t* address, uint64_t bytes) { hash->update(address, bytes); });
    uint8_t* beside = buffer ? buffer + (part.straight - part.from) : nullptr;
    for_each_slice(part.page->page, part.straight, part.to, [&](uint8_t* address, uint64_t bytes) {
      copy(beside, address, bytes, hash);
      beside += bytes;
    });
    if (direction_ == Direction::Write && part.needs_buffer())
      std::memset(beside, 0, part.from + part.extent() - part.to);
  }

  // What is hashed is the buffer, which nobody else can change: so the checksum is of the very
  // bytes that are written, or handed out.
  void copy(uint8_t* buffer, uint8_t* memory, uint64_t bytes, Xxh3* hash) const {
    for (uint64_t at = 0; at < bytes; at += kHashedAtOnce) {
      const uint64_t n = std::min(bytes - at, kHashedAtOnce);
      if (direction_ == Direction::Write) std::memcpy(buffer + at, memory + at, n);
      if (hash) hash->update(buffer + at, n);
      if (direction_ == Direction::Read) std::memcpy(memory + at, buffer + at, n);
    }
  }

  static void fail(const Part& part, int error) {
    if (part.split) return part.split->fail(error);
    part.page->error = error;
    part.page->checksum = 0;
  }

  SlotFile& file_;
  BufferPool& buffers_;
  const Direction direction_;
  const Limits limits_;
  Plan plan_;
};

}  // namespace lmcache::io
