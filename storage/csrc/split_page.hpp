// The checksum of a page whose pieces are in flight at once and come in out of order.
#pragma once

#include <mutex>
#include <span>
#include <vector>

#include "../../kernels/csrc/pages.hpp"
#include "../../kernels/csrc/xxh3.hpp"
#include "transfer.hpp"

namespace lmcache::io {

// Calls `visit(address, bytes)` for the memory of a page's bytes [from, to), in order.
template <typename Visit>
void for_each_slice(std::span<const Segment> page, uint64_t from, uint64_t to, Visit&& visit) {
  uint64_t begin = 0;
  for (const Segment& segment : page) {
    const uint64_t end = begin + segment.bytes;
    const uint64_t low = std::max(begin, from), high = std::min(end, to);
    if (low < high) visit(segment.address + (low - begin), high - low);
    if (end >= to) return;
    begin = end;
  }
}

// XXH3 takes the bytes in order. Whoever brings the piece whose turn it is hashes it, and then
// those behind it that were there already; everyone else leaves theirs to him. So hashing overlaps
// with the I/O of later pieces, and nobody waits.
class SplitPage {
 public:
  SplitPage(Transfer& transfer, uint64_t piece_bytes)
      : transfer_(transfer),
        piece_bytes_(piece_bytes),
        hash_(transfer.seed),
        arrived_((transfer.bytes + piece_bytes - 1) / piece_bytes) {}

  // `bring(Xxh3*)` makes the bytes of the piece lie in the caller's memory and, given a hash,
  // hashes them on the way.
  template <typename Bring>
  void absorb(size_t piece, Bring&& bring) {
    if (claim(piece)) {
      bring(&hash_);
      hash_arrived(piece + 1);
    } else {
      bring(nullptr);
      if (arrive(piece)) hash_arrived(piece);
    }
  }

  void fail(int error) {
    const std::lock_guard lock(mutex_);
    if (error_ == 0) error_ = error;
  }

  int error() const {
    const std::lock_guard lock(mutex_);
    return error_;
  }

  // Once nothing is in flight any more.
  void conclude() {
    transfer_.error = error_;
    transfer_.checksum = error_ ? 0 : hash_.digest();
  }

 private:
  bool claim(size_t piece) {
    const std::lock_guard lock(mutex_);
    if (hashing_ || piece != next_) return false;
    return hashing_ = true;
  }

  // True when the caller now has to hash from this piece on.
  bool arrive(size_t piece) {
    const std::lock_guard lock(mutex_);
    arrived_[piece] = true;
    if (hashing_ || piece != next_) return false;
    return hashing_ = true;
  }

  void hash_arrived(size_t piece) {
    while (advance(piece)) {
      const uint64_t from = piece * piece_bytes_;
      for_each_slice(transfer_.page, from, std::min(from + piece_bytes_, transfer_.bytes),
                     [this](uint8_t* address, uint64_t bytes) { hash_.update(address, bytes); });
      ++piece;
    }
  }

  bool advance(size_t piece) {
    const std::lock_guard lock(mutex_);
    next_ = piece;
    hashing_ = piece < arrived_.size() && arrived_[piece];
    return hashing_;
  }

  Transfer& transfer_;
  const uint64_t piece_bytes_;
  Xxh3 hash_;  // belongs to whoever set `hashing_`
  mutable std::mutex mutex_;
  std::vector<bool> arrived_;
  size_t next_ = 0;
  bool hashing_ = false;
  int error_ = 0;
};

}  // namespace lmcache::io
