// Which peers hold which page: a table of words in shared memory, one word for each page and peer.
//
//   bits 63..6   the upper 58 bits of the page's tag       0: empty
//   bits  5..0   the peer                                  all ones: erased
//
// Words lie in lines of 64 bytes. A page's words are in its home line, or in the lines behind it as
// far as the first one that has an empty word, which ends every search. So an empty word never
// comes back to a line that was full: there a word is erased. One thread at a time writes, one word
// at a time; others read meanwhile, and need no more than that words are whole.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>

#include "shared_file.hpp"

namespace lmcache {

inline constexpr unsigned kPeers = 64;

class TagTable {
 public:
  static constexpr uint64_t kLineWords = 8;
  static constexpr uint64_t kHeadBytes = 4096;
  static constexpr size_t kGroup = 16;  // searches whose memory is on its way at a time

  // Of a table that is written; empty. lines: a power of two.
  TagTable(SharedFile file, uint64_t agent, uint64_t generation, uint64_t salt, uint64_t lines);
  // Of one that is read: what `is_whole` was said of.
  explicit TagTable(SharedFile file);
  static bool is_whole(const SharedFile& file, uint64_t agent, uint64_t generation);
  static uint64_t bytes_for(uint64_t lines) { return kHeadBytes + lines * kLineWords * 8; }

  // Of each tag the peers that hold it, one bit each.
  void holders(std::span<const uint64_t> tags, uint64_t among, uint64_t* masks) const;
  // Whether any of those peers holds it.
  void exists(std::span<const uint64_t> tags, uint64_t among, uint8_t* held) const;

  // Those that were not there, or were, respectively. `most`: of words that are not empty, erased
  // ones too; what would exceed it is left out, and counted.
  uint64_t put(unsigned peer, std::span<const uint64_t> tags, uint64_t most, uint64_t& left_out);
  uint64_t erase(unsigned peer, std::span<const uint64_t> tags);
  uint64_t erase_all(unsigned peer);
  // All words of another table, of at most as many lines; to an empty one.
  void copy_from(const TagTable& other);

  uint64_t lines() const { return lines_; }
  uint64_t words() const { return lines_ * kLineWords; }
  uint64_t bytes() const { return file_.bytes(); }
  uint64_t live() const { return live_; }
  uint64_t erased() const { return erased_; }
  void map_ahead() const { file_.map_ahead(); }

 private:
  using Word = std::atomic<uint64_t>;
  struct Head {
    char magic[8];
    uint64_t agent;
    uint64_t generation;
    uint64_t salt;
    uint64_t lines;
  };
  static_assert(sizeof(Word) == 8 && Word::is_always_lock_free);

  Head& head() const { return *reinterpret_cast<Head*>(file_.data()); }
  Word* line_at(uint64_t line) const { return words_ + (line & (lines_ - 1)) * kLineWords; }
  uint64_t home_of(uint64_t wanted) const;
  template <class Visit>
  void in_groups(std::span<const uint64_t> tags, const Visit& visit) const;
  template <bool kFirstOnly>
  uint64_t search(uint64_t wanted, uint64_t home, uint64_t among) const;
  Word* find(uint64_t word, uint64_t home, Word*& free) const;
  void erase_at(Word* at);

  SharedFile file_;
  Word* words_;
  uint64_t lines_;
  uint64_t salt_;
  unsigned shift_;
  uint64_t live_ = 0, erased_ = 0;  // as counted by who writes
};

}  // namespace lmcache
