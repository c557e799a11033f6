// What a copy of pages is, once layouts are compared: the one parameter of the kernels.
//
// The bytes to move are `run`s, contiguous on both sides. Where a run lies is a sum of offsets, one
// for each axis it is on:
//
//   span   so many tokens of one page, `spans` of them: a table, since pages are anywhere
//   row    one layer of one plane (K, or V): a table, since device pools are a buffer a layer
//   token, head    strides
//
// Axes that are contiguous on both sides are part of the run already. An *item* is all runs of the
// innermost axis, with one index of each other axis.
#pragma once

#include "portable.hpp"

namespace lmcache {

// Division by a number that is known long before what it divides (Granlund and Montgomery, 1994,
// "Division by invariant integers using multiplication", fig. 4.1), for 32 bits.
struct Divisor {
  uint32_t by = 1;
  uint32_t factor = 0;
  uint32_t shift = 0;

  Divisor() = default;
#if !defined(__CUDACC_RTC__)
  explicit Divisor(uint32_t n) : by(n) {
    while (shift < 32 && (uint64_t{1} << shift) < n) ++shift;
    factor = static_cast<uint32_t>((((uint64_t{1} << shift) - n) << 32) / n + 1);
  }
#endif

  LMCACHE_HD uint32_t divide(uint32_t n) const {
    const uint64_t high = (uint64_t{n} * factor) >> 32;
    return static_cast<uint32_t>((high + n) >> shift);
  }
};

// Which side's offsets: of numbers that are converted there are scales beside them.
enum Side : unsigned { kSrc, kDst, kScale, kSides };

struct Axis {
  Divisor count;
  uint32_t is_row = 0;  // its offsets are in the table of rows
  int64_t stride[kSides] = {};
};

enum class Convert : uint8_t { kNone, kBf16ToE4m3, kFp16ToE4m3, kE4m3ToBf16, kE4m3ToFp16 };

inline constexpr unsigned kAxes = 3;  // row, token and head, the innermost last

struct CopyParams {
  const uint64_t* span[kSides] = {};  // offsets, or addresses
  const uint64_t* row[kSides] = {};   // addresses, or offsets
  Axis axis[kAxes];
  uint32_t spans = 0;
  uint32_t run = 0;    // bytes; of converted numbers, how many they are
  uint32_t width = 1;  // of a GPU: bytes of the longest word that fits all addresses and the run
  Divisor words;       // of a run

  LMCACHE_HD uint32_t items() const { return spans * axis[0].count.by * axis[1].count.by; }
};

}  // namespace lmcache
