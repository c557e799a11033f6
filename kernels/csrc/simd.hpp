// Which vector unit the data plane uses.
//
// A body is written once, with the compiler's vector types, and compiled for each unit; what runs
// is picked at run time. Function clones of the linker's (ifunc) would do the picking too, but
// neither under sanitizers nor by the wish of a test.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LMCACHE_ALWAYS_INLINE inline __attribute__((always_inline))

namespace lmcache {

enum class Simd : uint8_t { kBaseline, kAvx2, kAvx512 };

inline bool supports(Simd unit) {
#if defined(__x86_64__)
  if (unit == Simd::kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (unit == Simd::kAvx2) return __builtin_cpu_supports("avx2");
#endif
  return unit == Simd::kBaseline;
}

inline Simd best_simd() {
  if (supports(Simd::kAvx512)) return Simd::kAvx512;
  return supports(Simd::kAvx2) ? Simd::kAvx2 : Simd::kBaseline;
}

// The unit in use; tests set it to one that the processor supports.
inline std::atomic<Simd>& simd() {
  static std::atomic<Simd> unit = best_simd();
  return unit;
}

// So many bytes of 64-bit lanes, as one value of a vector unit. Always passed by reference: how it
// is passed by value depends on the unit a function is compiled for.
template <size_t kBytes>
struct VectorOf {
  typedef uint64_t Type __attribute__((vector_size(kBytes)));
};
template <size_t kBytes>
using Vector = typename VectorOf<kBytes>::Type;

template <class V>
LMCACHE_ALWAYS_INLINE void load(V& vector, const void* p) {
  std::memcpy(&vector, p, sizeof vector);
}

#if defined(__x86_64__)
#define LMCACHE_AVX2 __attribute__((target("avx2")))
#define LMCACHE_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))

template <class Body, class... Args>
LMCACHE_AVX2 void run_avx2(Args... args) {
  Body::template run<32>(args...);
}

template <class Body, class... Args>
LMCACHE_AVX512 void run_avx512(Args... args) {
  Body::template run<64>(args...);
}
#endif

template <class Body, class... Args>
void run_baseline(Args... args) {
  Body::template run<16>(args...);
}

// Runs Body::run<bytes of a vector>, which is always inlined, as compiled for the unit in use.
template <class Body, class... Args>
void run_simd(Args... args) {
  switch (simd().load(std::memory_order_relaxed)) {
#if defined(__x86_64__)
    case Simd::kAvx512:
      return run_avx512<Body>(args...);
    case Simd::kAvx2:
      return run_avx2<Body>(args...);
#endif
    default:
      return run_baseline<Body>(args...);
  }
}

}  // namespace lmcache
