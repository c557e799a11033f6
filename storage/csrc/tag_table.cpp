#include "tag_table.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

namespace lmcache {

namespace {

constexpr char kMagic[8] = {'l', 'm', 'c', 't', 'a', 'g', 's', '1'};
constexpr uint64_t kEmpty = 0;
constexpr uint64_t kErased = ~uint64_t{0};
constexpr uint64_t kPeerBits = kPeers - 1;
constexpr auto kRelaxed = std::memory_order_relaxed;

// The word of a tag and peer 0. Two tags of 2^58 share their words with a neighbour's, which leaves
// the words of no page for what is empty and what is erased.
uint64_t wanted_of(uint64_t tag) {
  return std::clamp(tag & ~kPeerBits, kPeerBits + 1, ~kPeerBits - (kPeerBits + 1));
}

// MurmurHash3's last step.
uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 33)) * 0xff51afd7ed558ccd;
  value = (value ^ (value >> 33)) * 0xc4ceb9fe1a85ec53;
  return value ^ (value >> 33);
}

unsigned shift_for(uint64_t lines) { return 64 - static_cast<unsigned>(std::countr_zero(lines)); }

}  // namespace

TagTable::TagTable(SharedFile file, uint64_t agent, uint64_t generation, uint64_t salt,
                   uint64_t lines)
    : file_(std::move(file)),
      words_(reinterpret_cast<Word*>(file_.data() + kHeadBytes)),
      lines_(lines),
      salt_(salt),
      shift_(shift_for(lines)) {
  head().agent = agent;
  head().generation = generation;
  head().salt = salt;
  head().lines = lines;
  std::memcpy(head().magic, kMagic, sizeof kMagic);
}

TagTable::TagTable(SharedFile file)
    : file_(std::move(file)),
      words_(reinterpret_cast<Word*>(file_.data() + kHeadBytes)),
      lines_(head().lines),
      salt_(head().salt),
      shift_(shift_for(lines_)) {}

bool TagTable::is_whole(const SharedFile& file, uint64_t agent, uint64_t generation) {
  if (file.bytes() <= kHeadBytes) return false;
  const Head& head = *reinterpret_cast<const Head*>(file.data());
  return std::memcmp(head.magic, kMagic, sizeof kMagic) == 0 && head.agent == agent &&
         head.generation == generation && head.lines > 1 && std::has_single_bit(head.lines) &&
         head.lines < file.bytes() && file.bytes() == bytes_for(head.lines);
}

// By the upper bits, so that a table of twice the lines has its pages in the same order. Salted, so
// that no peer can choose tags that all have the same home.
uint64_t TagTable::home_of(uint64_t wanted) const { return mix(wanted ^ salt_) >> shift_; }

// The table is far larger than the caches: of a group of searches, all first lines are asked for
// before the first one is looked at.
template <class Visit>
void TagTable::in_groups(std::span<const uint64_t> tags, const Visit& visit) const {
  std::array<uint64_t, kGroup> wanted, homes;
  for (size_t first = 0; first < tags.size(); first += kGroup) {
    const size_t count = std::min(kGroup, tags.size() - first);
    for (size_t i = 0; i < count; ++i) {
      wanted[i] = wanted_of(tags[first + i]);
      homes[i] = home_of(wanted[i]);
      __builtin_prefetch(line_at(homes[i]));
    }
    for (size_t i = 0; i < count; ++i) visit(first + i, wanted[i], homes[i]);
  }
}

// kFirstOnly: any of them will do.
template <bool kFirstOnly>
uint64_t TagTable::search(uint64_t wanted, uint64_t home, uint64_t among) const {
  uint64_t found = 0;
  for (uint64_t step = 0; step < lines_; ++step) {
    const Word* line = line_at(home + step);
    bool last = false;
    for (uint64_t i = 0; i < kLineWords; ++i) {
      const uint64_t word = line[i].load(kRelaxed), peer = word ^ wanted;
      found |= uint64_t{peer < kPeers} << (peer & kPeerBits);
      last |= word == kEmpty;
    }
    if (last || (kFirstOnly && (found & among) != 0)) break;
  }
  return found & among;
}

void TagTable::holders(std::span<const uint64_t> tags, uint64_t among, uint64_t* masks) const {
  in_groups(tags, [&](size_t i, uint64_t wanted, uint64_t home) {
    masks[i] = search<false>(wanted, home, among);
  });
}

void TagTable::exists(std::span<const uint64_t> tags, uint64_t among, uint8_t* held) const {
  in_groups(tags, [&](size_t i, uint64_t wanted, uint64_t home) {
    held[i] = search<true>(wanted, home, among) != 0;
  });
}

// Where the word is; null when it is not there. `free`: where it may be put then; null: nowhere.
TagTable::Word* TagTable::find(uint64_t word, uint64_t home, Word*& free) const {
  free = nullptr;
  for (uint64_t step = 0; step < lines_; ++step) {
    Word* line = line_at(home + step);
    Word* empty = nullptr;
    for (Word* at = line; at < line + kLineWords; ++at) {
      const uint64_t there = at->load(kRelaxed);
      if (there == word) return at;
      if (there == kErased && free == nullptr) free = at;
      if (there == kEmpty && empty == nullptr) empty = at;
    }
    if (empty == nullptr) continue;
    if (free == nullptr) free = empty;
    return nullptr;
  }
  return nullptr;
}

uint64_t TagTable::put(unsigned peer, std::span<const uint64_t> tags, uint64_t most,
                       uint64_t& left_out) {
  uint64_t added = 0;
  in_groups(tags, [&](size_t, uint64_t wanted, uint64_t home) {
    Word* free;
    if (find(wanted | peer, home, free) != nullptr) return;
    const bool reused = free != nullptr && free->load(kRelaxed) == kErased;
    if (free == nullptr || (!reused && live_ + erased_ >= most)) {
      ++left_out;
      return;
    }
    free->store(wanted | peer, kRelaxed);
    erased_ -= reused;
    ++live_;
    ++added;
  });
  return added;
}

void TagTable::erase_at(Word* at) {
  const auto offset = static_cast<uint64_t>(at - words_) % kLineWords;
  const Word* line = at - offset;
  const bool ends = std::any_of(line, line + kLineWords,
                                [](const Word& word) { return word.load(kRelaxed) == kEmpty; });
  at->store(ends ? kEmpty : kErased, kRelaxed);
  erased_ += !ends;
  --live_;
}

uint64_t TagTable::erase(unsigned peer, std::span<const uint64_t> tags) {
  uint64_t gone = 0;
  in_groups(tags, [&](size_t, uint64_t wanted, uint64_t home) {
    Word* free;
    Word* at = find(wanted | peer, home, free);
    if (at == nullptr) return;
    erase_at(at);
    ++gone;
  });
  return gone;
}

uint64_t TagTable::erase_all(unsigned peer) {
  uint64_t gone = 0;
  for (Word* at = words_; at < words_ + words(); ++at) {
    const uint64_t word = at->load(kRelaxed);
    if (word == kEmpty || word == kErased || (word & kPeerBits) != peer) continue;
    erase_at(at);
    ++gone;
  }
  return gone;
}

// In the order of the other's lines, which is nearly that of our own: the memory is walked once.
void TagTable::copy_from(const TagTable& other) {
  for (const Word* from = other.words_; from < other.words_ + other.words(); ++from) {
    const uint64_t word = from->load(kRelaxed);
    if (word == kEmpty || word == kErased) continue;
    Word* free;
    find(word, home_of(word & ~kPeerBits), free);
    free->store(word, kRelaxed);
    ++live_;
  }
}

}  // namespace lmcache
