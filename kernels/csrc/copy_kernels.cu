// The copy on a GPU: threads of launch.hpp, with the GPU's own loads, stores and exchange between
// lanes. Compiled by nvcc and by NVRTC alike; names are C's, so that a module finds them.
#include "launch.hpp"

namespace {

using lmcache::CopyLaunch;
using lmcache::Place;

// Past the first-level cache: nothing is read twice. What was written stays in the second level,
// where attention finds it.
struct Global {
  template <class Type>
  __device__ __forceinline__ Type load(uint64_t at) const {
    if constexpr (sizeof(Type) == 16) {
      const uint4 word = __ldcs(reinterpret_cast<const uint4*>(at));
      return Type{{word.x, word.y, word.z, word.w}};
    } else {
      return __ldcs(reinterpret_cast<const Type*>(at));
    }
  }

  template <class Type>
  __device__ __forceinline__ void store(uint64_t at, Type value) const {
    if constexpr (sizeof(Type) == 16) {
      const auto& part = value.part;
      __stcg(reinterpret_cast<uint4*>(at), make_uint4(part[0], part[1], part[2], part[3]));
    } else {
      __stcg(reinterpret_cast<Type*>(at), value);
    }
  }
};

__device__ __forceinline__ Place here(const CopyLaunch& launch) {
  return lmcache::place_of(launch.lanes, blockIdx.x, threadIdx.x, gridDim.x);
}

// The largest that any lane of the group has. Lanes of a group are of one warp and always go the
// same way; other groups of the warp need not.
__device__ __forceinline__ float largest_of_group(float value, uint32_t lanes) {
  const uint32_t first = threadIdx.x % lmcache::kWarp & ~(lanes - 1);
  const uint32_t mask = (0xFFFFFFFFu >> (lmcache::kWarp - lanes)) << first;
  for (uint32_t step = lanes / 2; step > 0; step /= 2)
    value = lmcache::larger(value, __shfl_xor_sync(mask, value, step));
  return value;
}

template <class Half, unsigned kBy>
__device__ __forceinline__ void quantize(const CopyLaunch& launch) {
  const lmcache::CopyParams& p = launch.copy;
  const Place at = here(launch);
  const Global memory;
  const uint32_t items = p.items(), runs = p.axis[lmcache::kAxes - 1].count.by;
  for (uint32_t number = at.group; number < items; number += at.groups) {
    const lmcache::Item item = lmcache::find_item(p, number, lmcache::kSides);
    for (uint32_t run = 0; run < runs; ++run) {
      const lmcache::Converted where(p, item, run);
      const float seen = lmcache::look_at_run<Half, kBy>(launch, where, at.lane, memory);
      const float largest = largest_of_group(seen, launch.lanes);
      lmcache::quantize_run<Half, kBy>(launch, where, largest, at.lane, memory);
    }
  }
}

}  // namespace

#define LMCACHE_KERNEL extern "C" __global__ void __launch_bounds__(lmcache::kThreads)

#define LMCACHE_COPY(width)                                                                 \
  LMCACHE_KERNEL lmcache_copy_##width(const __grid_constant__ lmcache::CopyLaunch launch) { \
    lmcache::copy_thread<width>(launch, here(launch), Global());                            \
  }
LMCACHE_COPY_KERNELS(LMCACHE_COPY)

#define LMCACHE_CONVERT(name, Half, by)                                            \
  LMCACHE_KERNEL lmcache_quantize_##name##_##by(                                   \
      const __grid_constant__ lmcache::CopyLaunch launch) {                        \
    quantize<lmcache::Half, by>(launch);                                           \
  }                                                                                \
  LMCACHE_KERNEL lmcache_dequantize_##name##_##by(                                 \
      const __grid_constant__ lmcache::CopyLaunch launch) {                        \
    lmcache::dequantize_thread<lmcache::Half, by>(launch, here(launch), Global()); \
  }
LMCACHE_CONVERT_KERNELS(LMCACHE_CONVERT)
