// What Python's callers ask for, as the planner takes it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "copy_plan.hpp"

namespace lmcache {

using Slots =
    nanobind::ndarray<const int64_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// Throws LayoutError, which names the argument.
inline Slots slots_of(const nanobind::object& given, const char* name) {
  Slots slots;
  if (!nanobind::try_cast<Slots>(given, slots, false))
    throw LayoutError(std::string(name) + ": not int64 [n], contiguous, in host memory");
  return slots;
}

// Throws LayoutError, which names the argument.
inline CopyRequest request_of(const Slots& src_slots, const Slots& dst_slots, uint32_t tokens,
                              uint32_t first_layer, uint32_t last_layer, uint32_t convert) {
  if (convert > static_cast<uint32_t>(Convert::kE4m3ToFp16))
    throw LayoutError("convert: " + std::to_string(convert) + " is no conversion");
  CopyRequest request;
  request.slots[kSrc].assign(src_slots.data(), src_slots.data() + src_slots.size());
  request.slots[kDst].assign(dst_slots.data(), dst_slots.data() + dst_slots.size());
  request.tokens = tokens;
  request.layers[0] = first_layer;
  request.layers[1] = last_layer;
  request.convert = static_cast<Convert>(convert);
  return request;
}

}  // namespace lmcache
