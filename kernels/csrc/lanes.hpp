// The inner loop of XXH3: stripes of 64 bytes, summed up in eight 64-bit lanes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.hpp"

namespace lmcache::xxh3 {

inline constexpr size_t kSecretBytes = 192;
inline constexpr size_t kStripeBytes = 64;
inline constexpr size_t kSecretStep = 8;  // the secret moves on by this much for each stripe
inline constexpr size_t kStripesPerBlock = (kSecretBytes - kStripeBytes) / kSecretStep;
inline constexpr uint64_t kScramblePrime = 0x9E3779B1;

LMCACHE_ALWAYS_INLINE void swap_neighbours(Vector<16>& v) {
  v = __builtin_shufflevector(v, v, 1, 0);
}

// The product of each lane's halves. Compilers know of no instruction for this expression: written
// so, it takes three multiplications, and half the speed.
LMCACHE_ALWAYS_INLINE void multiply_halves(Vector<16>& v) {
#if defined(__x86_64__)
  v = reinterpret_cast<Vector<16>>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(v), reinterpret_cast<__m128i>(v >> 32)));
#else
  v = (v & 0xFFFFFFFF) * (v >> 32);
#endif
}

#if defined(__x86_64__)
LMCACHE_AVX2 inline void swap_neighbours(Vector<32>& v) {
  v = __builtin_shufflevector(v, v, 1, 0, 3, 2);
}

LMCACHE_AVX2 inline void multiply_halves(Vector<32>& v) {
  v = reinterpret_cast<Vector<32>>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(v), reinterpret_cast<__m256i>(v >> 32)));
}

LMCACHE_AVX512 inline void swap_neighbours(Vector<64>& v) {
  v = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
}

LMCACHE_AVX512 inline void multiply_halves(Vector<64>& v) {
  constexpr __mmask8 kAll = 0xFF;  // GCC 12 warns of its own header's form without a mask
  v = reinterpret_cast<Vector<64>>(_mm512_maskz_mul_epu32(kAll, reinterpret_cast<__m512i>(v),
                                                          reinterpret_cast<__m512i>(v >> 32)));
}
#endif

// The eight lanes. A loop over stripes keeps them here, in registers: through memory it is bound by
// the latency of a store and a load, 19 against 118 GB/s on 2 MiB.
template <size_t kWidth>
struct Lanes {
  static constexpr size_t kVectors = kStripeBytes / kWidth;

  LMCACHE_ALWAYS_INLINE explicit Lanes(const uint64_t* sums) {
    std::memcpy(vectors, sums, sizeof vectors);
  }

  LMCACHE_ALWAYS_INLINE void accumulate(const uint8_t* in, const uint8_t* secret) {
    for (size_t i = 0; i < kVectors; ++i) {
      Vector<kWidth> data, key;
      load(data, in + i * kWidth);
      load(key, secret + i * kWidth);
      key ^= data;
      multiply_halves(key);
      swap_neighbours(data);
      vectors[i] += data + key;
    }
  }

  LMCACHE_ALWAYS_INLINE void scramble(const uint8_t* secret) {
    for (size_t i = 0; i < kVectors; ++i) {
      Vector<kWidth> key;
      load(key, secret + i * kWidth);
      vectors[i] ^= (vectors[i] >> 47) ^ key;
      vectors[i] *= kScramblePrime;
    }
  }

  Vector<kWidth> vectors[kVectors];
};

// Takes stripes of which the first is number `at` of its block. A block's scramble follows at once,
// so the caller must know of at least one byte behind the last stripe.
struct AccumulateStripes {
  template <size_t kWidth>
  LMCACHE_ALWAYS_INLINE static void run(uint64_t* sums, const uint8_t* in, size_t stripes,
                                        size_t at, const uint8_t* secret) {
    Lanes<kWidth> lanes(sums);
    while (stripes > 0) {
      const size_t some = std::min(stripes, kStripesPerBlock - at);
      for (size_t i = 0; i < some; ++i)
        lanes.accumulate(in + i * kStripeBytes, secret + (at + i) * kSecretStep);
      in += some * kStripeBytes;
      stripes -= some;
      at = (at + some) % kStripesPerBlock;
      if (at == 0) lanes.scramble(secret + kSecretBytes - kStripeBytes);
    }
    std::memcpy(sums, lanes.vectors, sizeof lanes.vectors);
  }
};

}  // namespace lmcache::xxh3
