// Copies of pages on a CPU: items in the order of the destination, shared among threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "copy.hpp"
#include "copy_body.hpp"
#include "copy_plan.hpp"
#include "fp8.hpp"
#include "workers.hpp"

namespace lmcache {

// A plan that writes as much as the caches hold goes past them, where a run has lines to stream.
inline constexpr uint64_t kStreamPlanFrom = uint64_t{1} << 20;
inline constexpr uint32_t kStreamRunFrom = 4 * copying::kLineBytes;
inline constexpr uint64_t kBytesOfAJob = uint64_t{256} << 10;

// How far ahead of its reads a copy asks for lines: a run ends before the processor's own
// prefetching has begun.
inline constexpr uint32_t kPieceBytes = 1024;
inline constexpr uint32_t kAheadBytes = 4096;

// Moves runs with the stores that suit: past the caches, or with them.
struct StreamRun {
  static void move(uint8_t* to, const uint8_t* from, size_t n) { copying::stream(to, from, n); }
};

struct CacheRun {
  static void move(uint8_t* to, const uint8_t* from, size_t n) { std::memcpy(to, from, n); }
};

// Pieces of runs, of `kPieceBytes` at most, one after another through all items.
class Pieces {
 public:
  Pieces(const CopyParams& p, uint32_t first, uint32_t last)
      : p_(p), inner_(p.axis[kAxes - 1]), last_(last), number_(first) {
    if (!ended()) start_item();
  }

  bool ended() const { return number_ == last_; }
  uint8_t* to() const { return to_ + done_; }
  const uint8_t* from() const { return from_ + done_; }
  uint32_t bytes() const { return std::min(p_.run - done_, kPieceBytes); }

  void next() {
    done_ += bytes();
    if (done_ < p_.run) return;
    if (++run_ < inner_.count.by) return start_run();
    if (++number_ < last_) start_item();
  }

 private:
  void start_item() {
    item_ = find_item(p_, number_, 2);
    run_ = 0;
    start_run();
  }

  void start_run() {
    done_ = 0;
    from_ = reinterpret_cast<const uint8_t*>(item_.at[kSrc] + offset(p_, inner_, kSrc, run_));
    to_ = reinterpret_cast<uint8_t*>(item_.at[kDst] + offset(p_, inner_, kDst, run_));
  }

  const CopyParams& p_;
  const Axis& inner_;
  const uint32_t last_;
  uint32_t number_;
  uint32_t run_ = 0;
  uint32_t done_ = 0;  // bytes of the run
  Item item_;
  const uint8_t* from_;
  uint8_t* to_;
};

inline void ask_for(const Pieces& piece) {
  for (uint32_t i = 0; i < piece.bytes(); i += copying::kLineBytes)
    __builtin_prefetch(piece.from() + i);
}

template <class Move>
void copy_items(const CopyParams& p, uint32_t first, uint32_t last) {
  Pieces ahead(p, first, last), now(p, first, last);
  for (uint32_t bytes = 0; bytes < kAheadBytes && !ahead.ended(); ahead.next()) {
    bytes += ahead.bytes();
    ask_for(ahead);
  }
  for (; !now.ended(); now.next()) {
    if (!ahead.ended()) {
      ask_for(ahead);
      ahead.next();
    }
    Move::move(now.to(), now.from(), now.bytes());
  }
}

template <class How>
void convert_items(const CopyParams& p, uint32_t first, uint32_t last) {
  for (uint32_t number = first; number < last; ++number) {
    const Item item = find_item(p, number, kSides);
    for (uint32_t run = 0; run < p.axis[kAxes - 1].count.by; ++run) {
      const Converted at(p, item, run);
      if constexpr (How::kMakesScale) *at.scale = How::scale(How::largest(at.from, p.run, 0, 1));
      convert_run<How>(at.to, at.from, p.run, *at.scale, 0, 1);
    }
  }
}

// Consecutive items whose runs are one word each, so that a side's bytes of a line are many runs'.
template <class Word>
class Words {
 public:
  // Items `number` to `last`, as far as they differ by their index on axis 1 alone.
  Words(const CopyParams& p, uint32_t number, uint32_t last)
      : item_(find_item(p, number, 2)), across_(p.axis[kAxes - 1]), down_(p.axis[1]) {
    const uint32_t second = number - down_.count.divide(number) * down_.count.by;
    items = std::min(last - number, down_.count.by - second);
  }

  void copy() const {
    const uint32_t runs = across_.count.by;
    if (down_.stride[kSrc] != sizeof(Word) || across_.stride[kDst] != sizeof(Word))
      return one_by_one(0, items, 0, runs);
    const uint32_t rows = items - items % kTile, columns = runs - runs % kTile;
    for (uint32_t row = 0; row < rows; row += kTile)
      for (uint32_t column = 0; column < columns; column += kTile) transpose(row, column);
    one_by_one(0, rows, columns, runs);
    one_by_one(rows, items, 0, runs);
  }

  uint32_t items;

 private:
  static constexpr uint32_t kTile = copying::kLineBytes / sizeof(Word);

  // A line of each run's words is read at once, and a line of each item's is written: either side
  // alone would come back to lines that a power of two apart have pushed out of the cache.
  void transpose(uint32_t row, uint32_t column) const {
    Word tile[kTile][kTile];
    for (uint32_t i = 0; i < kTile; ++i)
      std::memcpy(tile[i], from(row, column + i), copying::kLineBytes);
    for (uint32_t j = 0; j < kTile; ++j) {
      Word line[kTile];
      for (uint32_t i = 0; i < kTile; ++i) line[i] = tile[i][j];
      std::memcpy(to(row + j, column), line, copying::kLineBytes);
    }
  }

  void one_by_one(uint32_t row, uint32_t rows, uint32_t column, uint32_t columns) const {
    for (uint32_t j = row; j < rows; ++j)
      for (uint32_t i = column; i < columns; ++i) std::memcpy(to(j, i), from(j, i), sizeof(Word));
  }

  const uint8_t* from(uint32_t item, uint32_t run) const {
    return reinterpret_cast<const uint8_t*>(at(kSrc, item, run));
  }
  uint8_t* to(uint32_t item, uint32_t run) const {
    return reinterpret_cast<uint8_t*>(at(kDst, item, run));
  }
  uint64_t at(Side side, uint32_t item, uint32_t run) const {
    return item_.at[side] + static_cast<uint64_t>(down_.stride[side]) * item +
           static_cast<uint64_t>(across_.stride[side]) * run;
  }

  const Item item_;
  const Axis& across_;
  const Axis& down_;
};

template <class Word>
void copy_words(const CopyParams& p, uint32_t first, uint32_t last) {
  for (uint32_t number = first; number < last;) {
    const Words<Word> words(p, number, last);
    words.copy();
    number += words.items;
  }
}

using CopyItems = void (*)(const CopyParams&, uint32_t first, uint32_t last);

inline bool streams(const CopyPlan& plan, const CopyParams& part) {
  return plan.bytes() >= kStreamPlanFrom && part.run >= kStreamRunFrom;
}

inline CopyItems cpu_kernel(const CopyPlan& plan, const CopyParams& part) {
  switch (plan.convert()) {
    case Convert::kBf16ToE4m3:
      return convert_items<Quantize<Bf16>>;
    case Convert::kFp16ToE4m3:
      return convert_items<Quantize<Fp16>>;
    case Convert::kE4m3ToBf16:
      return convert_items<Dequantize<Bf16>>;
    case Convert::kE4m3ToFp16:
      return convert_items<Dequantize<Fp16>>;
    case Convert::kNone:
      break;
  }
  if (!part.axis[kAxes - 1].is_row && !part.axis[1].is_row) {
    switch (part.run) {
      case 1:
        return copy_words<uint8_t>;
      case 2:
        return copy_words<uint16_t>;
      case 4:
        return copy_words<uint32_t>;
      case 8:
        return copy_words<uint64_t>;
      default:
        break;
    }
  }
  return streams(plan, part) ? copy_items<StreamRun> : copy_items<CacheRun>;
}

// Runs that follow one another on the source's side are next to one another: `Words` copies them
// together.
inline CopyParams ordered(CopyParams p) {
  const auto follows = [&p](const Axis& axis) {
    return !axis.is_row && axis.stride[kSrc] == p.run;
  };
  if (follows(p.axis[0]) && !follows(p.axis[1])) std::swap(p.axis[0], p.axis[1]);
  return p;
}

// All bytes are where every thread sees them when this returns.
inline void copy_on_cpu(const CopyPlan& plan, Workers& workers) {
  for (const CopyParams& planned : plan.parts()) {
    const CopyParams part = ordered(planned);
    const CopyItems kernel = cpu_kernel(plan, part);
    const uint64_t item_bytes = uint64_t{part.axis[kAxes - 1].count.by} * part.run;
    const uint32_t items = part.items();
    const auto of_a_job = static_cast<uint32_t>(
        std::clamp<uint64_t>(kBytesOfAJob / std::max<uint64_t>(item_bytes, 1), 1, items + 1ull));
    const size_t jobs = (uint64_t{items} + of_a_job - 1) / of_a_job;
    workers.run(jobs, [&](size_t job) {
      const auto first = static_cast<uint32_t>(job * of_a_job);
      kernel(part, first,
             static_cast<uint32_t>(std::min<uint64_t>(items, first + uint64_t{of_a_job})));
      copying::fence();
    });
  }
}

}  // namespace lmcache
