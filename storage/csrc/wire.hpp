// MessagePack, as far as frames of pages need it. peers/messages.py defines the messages.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace lmcache::wire {

inline constexpr uint64_t kPage = 17;     // its request, page, offset, checksum
inline constexpr uint64_t kWithout = 18;  // its request, page, count, why
inline constexpr size_t kNumbers = 5;     // of both, with the kind before them
inline constexpr uint64_t kSmall = uint64_t{1} << 32;

using Numbers = std::array<uint64_t, kNumbers>;

// Reads what is left of a message; nothing is ever read beyond its end.
class Reader {
 public:
  explicit Reader(std::span<const uint8_t> bytes) : left_(bytes) {}

  bool done() const { return left_.empty(); }

  // How many elements follow.
  std::optional<uint64_t> array() {
    const auto first = big_endian(1);
    if (!first) return {};
    if ((*first & 0xf0) == 0x90) return *first & 0x0f;
    if (*first == 0xdc) return big_endian(2);
    if (*first == 0xdd) return big_endian(4);
    return {};
  }

  // Of any width, unsigned.
  std::optional<uint64_t> number() {
    const auto first = big_endian(1);
    if (!first) return {};
    if (*first < 0x80) return first;
    if (*first < 0xcc || *first > 0xcf) return {};
    return big_endian(size_t{1} << (*first - 0xcc));
  }

 private:
  std::optional<uint64_t> big_endian(size_t width) {
    if (left_.size() < width) return {};
    uint64_t value = 0;
    for (const uint8_t byte : left_.first(width)) value = value << 8 | byte;
    left_ = left_.subspan(width);
    return value;
  }

  std::span<const uint8_t> left_;
};

// A `Page` or `Without`: kind and fields. What a later version adds at its end is passed over.
inline std::optional<Numbers> numbers_of(std::span<const uint8_t> body) {
  Reader reader(body);
  const auto count = reader.array();
  if (!count || *count < kNumbers) return {};
  Numbers numbers;
  for (uint64_t& each : numbers) {
    const auto number = reader.number();
    if (!number) return {};
    each = *number;
  }
  if (*count == kNumbers && !reader.done()) return {};
  return numbers;
}

// The body of a message of such numbers, each as short as it goes.
class Body {
 public:
  explicit Body(const Numbers& numbers) {
    add(0x90 | kNumbers, 1);
    for (const uint64_t number : numbers) add_number(number);
  }
  std::span<const uint8_t> bytes() const { return {bytes_, size_}; }

 private:
  void add_number(uint64_t number) {
    if (number < 0x80) return add(number, 1);
    const int width = std::bit_ceil(static_cast<unsigned>(71 - std::countl_zero(number)) / 8);
    add(0xcc + std::countr_zero(static_cast<unsigned>(width)), 1);
    add(number, width);
  }
  void add(uint64_t value, int width) {
    while (width-- > 0) bytes_[size_++] = static_cast<uint8_t>(value >> (8 * width));
  }

  uint8_t bytes_[1 + kNumbers * 9];
  size_t size_ = 0;
};

}  // namespace lmcache::wire
