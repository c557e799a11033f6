// What lets one body be compiled for a CPU, by nvcc, and by NVRTC, which has no standard headers.
#pragma once

#if defined(__CUDACC_RTC__)
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define LMCACHE_HD __host__ __device__ __forceinline__
#define LMCACHE_UNROLL _Pragma("unroll")
#else
#define LMCACHE_HD inline __attribute__((always_inline))
#define LMCACHE_UNROLL
#endif

namespace lmcache {

// Bytes as one load or store moves them.
template <unsigned kBytes>
struct Word;
template <>
struct Word<1> {
  using Type = uint8_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint64_t;
};
template <>
struct Word<16> {
  struct alignas(16) Type {
    uint32_t part[4];
  };
};

}  // namespace lmcache
