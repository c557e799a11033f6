// Copying and hashing in one pass.
//
// Each block of the source is read once, into a block on the stack that stays in the first-level
// cache; hash and destination both take their bytes from there. So the digest is that of the bytes
// that were written, even where another process changes the source in the meantime.
//
// Large copies go past the caches by streaming stores: they need not read the destination's lines
// first, and leave the cache to the engine.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.hpp"
#include "xxh3.hpp"

namespace lmcache {
namespace copying {

inline constexpr size_t kLineBytes = 64;
inline constexpr size_t kBlockBytes = 4096;  // more is slower, and less is uneven over layouts

// Ordinary stores. Each line read asks for the one `ahead` of it, since the processor's own
// prefetching ends with a page of 4 KiB.
struct MoveLines {
  template <size_t kWidth>
  LMCACHE_ALWAYS_INLINE static void run(uint8_t* to, const uint8_t* from, size_t n, size_t ahead) {
    size_t i = 0;
    for (; i + kLineBytes <= n; i += kLineBytes) {
      __builtin_prefetch(from + i + ahead);
      for (size_t at = i; at < i + kLineBytes; at += kWidth) {
        Vector<kWidth> part;
        load(part, from + at);
        std::memcpy(to + at, &part, kWidth);
      }
      asm volatile("" ::: "memory");  // or the loop becomes a call of memcpy, at half the speed
    }
    if (i < n) std::memcpy(to + i, from + i, n - i);
  }
};

#if defined(__x86_64__)
inline void stream_baseline(uint8_t* to, const uint8_t* from, size_t n) {
  for (size_t i = 0; i < n; i += sizeof(__m128i))
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}

LMCACHE_AVX2 inline void stream_avx2(uint8_t* to, const uint8_t* from, size_t n) {
  for (size_t i = 0; i < n; i += sizeof(__m256i))
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
}

LMCACHE_AVX512 inline void stream_avx512(uint8_t* to, const uint8_t* from, size_t n) {
  for (size_t i = 0; i < n; i += sizeof(__m512i))
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}

// Streaming stores, of whole lines to a line's address.
inline void stream_lines(uint8_t* to, const uint8_t* from, size_t n) {
  switch (simd().load(std::memory_order_relaxed)) {
    case Simd::kAvx512:
      return stream_avx512(to, from, n);
    case Simd::kAvx2:
      return stream_avx2(to, from, n);
    default:
      return stream_baseline(to, from, n);
  }
}

// Streaming stores are ordered behind no other store, so whoever publishes the bytes fences first.
inline void fence() { _mm_sfence(); }
#else
inline void stream_lines(uint8_t* to, const uint8_t* from, size_t n) { std::memcpy(to, from, n); }
inline void fence() {}
#endif

inline size_t into_line(const uint8_t* p) { return reinterpret_cast<uintptr_t>(p) % kLineBytes; }

// Streaming stores where the destination has whole lines, ordinary ones at its ends.
inline void stream(uint8_t* to, const uint8_t* from, size_t n) {
  const size_t head = std::min(n, (kLineBytes - into_line(to)) % kLineBytes);
  const size_t body = (n - head) / kLineBytes * kLineBytes;
  if (head > 0) std::memcpy(to, from, head);
  stream_lines(to + head, from + head, body);
  const size_t done = head + body;
  if (done < n) std::memcpy(to + done, from + done, n - done);
}

}  // namespace copying

// Copies the parts of one page, and hashes what it copies.
class HashingCopy {
 public:
  // From here on streaming stores. Out of cache they are 1.5 times as fast at any size; in cache
  // the ordinary ones win by 1.7 at 4 KiB, and by a seventh here.
  static constexpr size_t kStreamFrom = size_t{16} << 10;

  // `bytes` are those of all parts together.
  HashingCopy(uint64_t seed, size_t bytes) : hash_(seed), streams_(bytes >= kStreamFrom) {}

  void copy(uint8_t* to, const uint8_t* from, size_t n) {
    // A first block that ends where a line of the destination does lets all others stream whole.
    size_t size = std::min(n, copying::kBlockBytes - copying::into_line(to));
    while (n > 0) {
      n -= size;
      copy_block(to, from, size, n >= copying::kBlockBytes ? size : 0);
      to += size;
      from += size;
      size = std::min(n, copying::kBlockBytes);
    }
  }

  // A part that is in its place already.
  void read(const uint8_t* from, size_t n) { hash_.update(from, n); }

  // All bytes are where every thread sees them; returns their hash.
  uint64_t finish() const {
    if (streams_) copying::fence();
    return hash_.digest();
  }

 private:
  void copy_block(uint8_t* to, const uint8_t* from, size_t n, size_t ahead) {
    alignas(copying::kLineBytes) uint8_t block[copying::kBlockBytes];
    run_simd<copying::MoveLines>(+block, from, n, ahead);
    hash_.update(block, n);
    if (streams_)
      copying::stream(to, block, n);
    else
      run_simd<copying::MoveLines>(to, static_cast<const uint8_t*>(block), n, size_t{0});
  }

  Xxh3 hash_;
  bool streams_;
};

}  // namespace lmcache
