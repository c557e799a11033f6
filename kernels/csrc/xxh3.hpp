// XXH3, the 64-bit variant with a seed, written from its specification:
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md (section "XXH3 algorithm").
//
// The values equal those of the `xxhash` package; tests/kernels/test_checksum.py compares them for
// every length class. It stands here because pages are hashed in the native pass that moves them,
// where calling back into Python would cost one wait for the GIL a page.
//
// Little-endian only, as every host of a CUDA GPU is.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "lanes.hpp"
#include "simd.hpp"

namespace lmcache {
namespace xxh3 {

static_assert(std::endian::native == std::endian::little, "page checksums assume little-endian");

inline constexpr uint32_t kPrime32_1 = 0x9E3779B1U;
inline constexpr uint32_t kPrime32_2 = 0x85EBCA77U;
inline constexpr uint32_t kPrime32_3 = 0xC2B2AE3DU;
inline constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87ULL;
inline constexpr uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4FULL;
inline constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9ULL;
inline constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63ULL;
inline constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5ULL;

inline constexpr size_t kShortBytes = 240;  // inputs up to here are hashed another way
inline constexpr size_t kLanes = 8;

inline constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

inline uint64_t load64(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline uint32_t load32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline void store64(uint8_t* p, uint64_t value) { std::memcpy(p, &value, sizeof value); }

inline uint64_t fold(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t avalanche(uint64_t h) {
  h = (h ^ (h >> 37)) * 0x165667919E3779F9ULL;
  return h ^ (h >> 32);
}

inline uint64_t avalanche_xxh64(uint64_t h) {
  h = (h ^ (h >> 33)) * kPrime64_2;
  h = (h ^ (h >> 29)) * kPrime64_3;
  return h ^ (h >> 32);
}

inline uint64_t mix16(const uint8_t* in, const uint8_t* secret, uint64_t seed) {
  return fold(load64(in) ^ (load64(secret) + seed), load64(in + 8) ^ (load64(secret + 8) - seed));
}

inline uint64_t hash_0_to_16(const uint8_t* in, size_t n, uint64_t seed) {
  if (n > 8) {
    const uint64_t low = load64(in) ^ ((load64(kSecret + 24) ^ load64(kSecret + 32)) + seed);
    const uint64_t high =
        load64(in + n - 8) ^ ((load64(kSecret + 40) ^ load64(kSecret + 48)) - seed);
    return avalanche(n + __builtin_bswap64(low) + high + fold(low, high));
  }
  if (n >= 4) {
    seed ^= static_cast<uint64_t>(__builtin_bswap32(static_cast<uint32_t>(seed))) << 32;
    const uint64_t both = load32(in + n - 4) + (static_cast<uint64_t>(load32(in)) << 32);
    uint64_t h = both ^ ((load64(kSecret + 8) ^ load64(kSecret + 16)) - seed);
    h ^= std::rotl(h, 49) ^ std::rotl(h, 24);
    h *= 0x9FB21C651E98DF25ULL;
    h = (h ^ ((h >> 35) + n)) * 0x9FB21C651E98DF25ULL;
    return h ^ (h >> 28);
  }
  if (n > 0) {
    const uint32_t all = (static_cast<uint32_t>(in[0]) << 16) |
                         (static_cast<uint32_t>(in[n >> 1]) << 24) | in[n - 1] |
                         (static_cast<uint32_t>(n) << 8);
    return avalanche_xxh64(all ^ ((load32(kSecret) ^ load32(kSecret + 4)) + seed));
  }
  return avalanche_xxh64(seed ^ load64(kSecret + 56) ^ load64(kSecret + 64));
}

inline uint64_t hash_17_to_128(const uint8_t* in, size_t n, uint64_t seed) {
  uint64_t acc = n * kPrime64_1;
  for (size_t i = (n - 1) / 32 + 1; i-- > 0;) {
    acc += mix16(in + 16 * i, kSecret + 32 * i, seed);
    acc += mix16(in + n - 16 * (i + 1), kSecret + 32 * i + 16, seed);
  }
  return avalanche(acc);
}

inline uint64_t hash_129_to_240(const uint8_t* in, size_t n, uint64_t seed) {
  uint64_t acc = n * kPrime64_1;
  for (size_t i = 0; i < 8; ++i) acc += mix16(in + 16 * i, kSecret + 16 * i, seed);
  acc = avalanche(acc);
  for (size_t i = 8; i < n / 16; ++i) acc += mix16(in + 16 * i, kSecret + 16 * (i - 8) + 3, seed);
  return avalanche(acc + mix16(in + n - 16, kSecret + 136 - 17, seed));
}

inline uint64_t hash_short(const uint8_t* in, size_t n, uint64_t seed) {
  if (n > 128) return hash_129_to_240(in, n, seed);
  if (n > 16) return hash_17_to_128(in, n, seed);
  return hash_0_to_16(in, n, seed);
}

// The hash of an input of more than 240 bytes, on its way.
class LongHash {
 public:
  explicit LongHash(uint64_t seed) {
    for (size_t i = 0; i < kSecretBytes; i += 16) {
      store64(secret_ + i, load64(kSecret + i) + seed);
      store64(secret_ + i + 8, load64(kSecret + i + 8) - seed);
    }
  }

  // At least one byte of input must follow.
  void take(const uint8_t* in, size_t stripes) {
    run_simd<AccumulateStripes>(+sums_, in, stripes, at_, static_cast<const uint8_t*>(secret_));
    at_ = (at_ + stripes) % kStripesPerBlock;
  }

  // `last` is the end of the input, which overlaps what was taken unless n is a multiple of 64.
  uint64_t finish(const uint8_t* last, size_t n) const {
    Lanes<16> lanes(sums_);
    lanes.accumulate(last, secret_ + kSecretBytes - kStripeBytes - 7);
    uint64_t sums[kLanes];
    std::memcpy(sums, lanes.vectors, sizeof sums);
    uint64_t merged = n * kPrime64_1;
    for (size_t i = 0; i < kLanes; i += 2)
      merged +=
          fold(sums[i] ^ load64(secret_ + 11 + 8 * i), sums[i + 1] ^ load64(secret_ + 19 + 8 * i));
    return avalanche(merged);
  }

 private:
  alignas(64) uint64_t sums_[kLanes] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                        kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  uint8_t secret_[kSecretBytes];
  size_t at_ = 0;  // stripes taken of the current block
};

}  // namespace xxh3

inline uint64_t xxh3_64(const void* data, size_t n, uint64_t seed = 0) {
  const auto* in = static_cast<const uint8_t*>(data);
  if (n <= xxh3::kShortBytes) return xxh3::hash_short(in, n, seed);
  xxh3::LongHash hash(seed);
  hash.take(in, (n - 1) / xxh3::kStripeBytes);
  return hash.finish(in + n - xxh3::kStripeBytes, n);
}

// The same hash of bytes that come in pieces.
class Xxh3 {
 public:
  explicit Xxh3(uint64_t seed) : seed_(seed), long_(seed) {}

  void update(const void* data, size_t n) {
    const auto* in = static_cast<const uint8_t*>(data);
    total_ += n;
    if (held_ + n > kHeldBytes) {
      const size_t taken = drain(in, n);
      in += taken;
      n -= taken;
    }
    hold(in, n);
  }

  uint64_t digest() const {
    if (total_ <= xxh3::kShortBytes) return xxh3::hash_short(held(), held_, seed_);
    xxh3::LongHash hash = long_;
    hash.take(held(), (held_ - 1) / xxh3::kStripeBytes);
    return hash.finish(held() + held_ - xxh3::kStripeBytes, total_);
  }

 private:
  static constexpr size_t kStripeBytes = xxh3::kStripeBytes;
  // Whole stripes, and enough of them that an input of the short classes is held to its end.
  static constexpr size_t kHeldBytes = 4 * kStripeBytes;
  static_assert(kHeldBytes >= xxh3::kShortBytes);

  const uint8_t* held() const { return window_ + kStripeBytes; }

  void hold(const uint8_t* in, size_t n) {
    if (n > 0) std::memcpy(window_ + kStripeBytes + held_, in, n);
    held_ += n;
  }

  // Takes what is held and all of the input that can be taken while a byte is still to follow;
  // returns how much of the input that was. The caller has more than the window holds.
  size_t drain(const uint8_t* in, size_t n) {
    size_t filled = 0;
    if (held_ > 0) {
      filled = kHeldBytes - held_;
      hold(in, filled);
      take(held(), kHeldBytes / kStripeBytes);
      held_ = 0;
    }
    const size_t stripes = (n - filled - 1) / kStripeBytes;
    if (stripes > 0) take(in + filled, stripes);
    return filled + stripes * kStripeBytes;
  }

  void take(const uint8_t* in, size_t stripes) {
    long_.take(in, stripes);
    std::memmove(window_, in + (stripes - 1) * kStripeBytes, kStripeBytes);
  }

  uint64_t seed_;
  xxh3::LongHash long_;
  uint64_t total_ = 0;
  size_t held_ = 0;
  // The last stripe that was taken, and behind it the bytes that are held: so the last 64 bytes of
  // the input, which the end of the hash needs, always lie in one piece.
  uint8_t window_[kStripeBytes + kHeldBytes];
};

}  // namespace lmcache
