// Numbers of 16 bits and of 8 (e4m3: Micikevicius et al., 2022, "FP8 formats for deep learning"; no
// infinities, 448 the largest). Rounding is integer arithmetic. The one float operation is by the
// scale; which NaN it makes differs between processors, so that no NaN's bits are taken from it: a
// NaN has the sign of its number and of the scale, and one mantissa.
#pragma once

#include "copy_body.hpp"

namespace lmcache {

LMCACHE_HD float as_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both{bits};
  return both.value;
}

LMCACHE_HD uint32_t bits_of(float value) {
  union {
    float value;
    uint32_t bits;
  } both{value};
  return both.bits;
}

// Drops the lowest `bits`, to nearest, ties to even.
LMCACHE_HD uint32_t round_off(uint32_t value, unsigned bits) {
  const uint32_t half = 1u << (bits - 1);
  return (value + half - 1 + ((value >> bits) & 1)) >> bits;
}

LMCACHE_HD uint32_t sign_of(float value) { return bits_of(value) & 0x80000000; }

// The bits of a float without its sign; beyond those of infinity is what is no number.
LMCACHE_HD uint32_t magnitude_of(float value) { return bits_of(value) & 0x7FFFFFFF; }

inline constexpr uint32_t kInfinity = 0x7F800000;

// Formats decode to a float, and encode a sign, as a float has it, and a magnitude.

struct Bf16 {
  LMCACHE_HD static float decode(uint16_t bits) { return as_float(uint32_t{bits} << 16); }

  LMCACHE_HD static uint16_t encode(uint32_t sign, uint32_t magnitude) {
    const uint32_t bits = magnitude > kInfinity ? 0x7FC0 : round_off(magnitude, 16);
    return static_cast<uint16_t>(sign >> 16 | bits);
  }
};

// A format of kExponent and kMantissa bits whose numbers are all floats: what e4m3 and fp16 share.
template <unsigned kMantissa, int kBias, uint32_t kLargest, uint32_t kAbove>
struct Small {
  static constexpr unsigned kDropped = 23 - kMantissa;

  // Of a magnitude; kAbove where it is beyond the largest.
  LMCACHE_HD static uint32_t encode_magnitude(uint32_t bits) {
    const int exponent = static_cast<int>(bits >> 23) - 127 + kBias;
    uint32_t small;
    if (exponent >= 1) {
      small = round_off(bits - (static_cast<uint32_t>(127 - kBias) << 23), kDropped);
    } else {
      const unsigned drop = kDropped + static_cast<unsigned>(1 - exponent);
      const uint32_t mantissa = (bits & 0x7FFFFF) | 0x800000;
      small = drop > 24 ? 0 : round_off(mantissa, drop);
    }
    return small > kLargest ? kAbove : small;
  }

  LMCACHE_HD static float decode_magnitude(uint32_t small) {
    if (small >> kMantissa)
      return as_float((small << kDropped) + (static_cast<uint32_t>(127 - kBias) << 23));
    return static_cast<float>(small) *
           as_float(static_cast<uint32_t>(127 + 1 - kBias - static_cast<int>(kMantissa)) << 23);
  }
};

struct Fp16 : Small<10, 15, 0x7BFF, 0x7C00> {
  LMCACHE_HD static float decode(uint16_t bits) {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16, magnitude = bits & 0x7FFFu;
    if (magnitude >= 0x7C00) return as_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    return as_float(sign | bits_of(decode_magnitude(magnitude)));
  }

  LMCACHE_HD static uint16_t encode(uint32_t sign, uint32_t magnitude) {
    const uint32_t bits = magnitude > kInfinity ? 0x7E00 : encode_magnitude(magnitude);
    return static_cast<uint16_t>(sign >> 16 | bits);
  }
};

struct E4m3 : Small<3, 7, 0x7E, 0x7E> {  // what is too large becomes the largest
  static constexpr uint8_t kNan = 0x7F;
  static constexpr float kMost = 448.0F;

  LMCACHE_HD static float decode(uint8_t bits) {
    const uint32_t sign = uint32_t{bits & 0x80u} << 24, magnitude = bits & 0x7Fu;
    if (magnitude == kNan) return as_float(sign | 0x7FC00000);
    return as_float(sign | bits_of(decode_magnitude(magnitude)));
  }

  LMCACHE_HD static uint8_t encode(uint32_t sign, uint32_t magnitude) {
    const uint32_t bits = magnitude > kInfinity ? kNan : encode_magnitude(magnitude);
    return static_cast<uint8_t>(sign >> 24 | bits);
  }
};

// Several numbers as one word, the first in its lowest bits.
template <class Number, unsigned kBy>
using Packet = typename Word<kBy * sizeof(Number)>::Type;

template <class Number, class Bits>
LMCACHE_HD Number number_of(const Bits& packet, unsigned i) {
  return static_cast<Number>(packet >> (8 * sizeof(Number) * i));
}

template <class Number>
LMCACHE_HD Number number_of(const Word<16>::Type& packet, unsigned i) {
  constexpr unsigned kEach = 4 / sizeof(Number);
  return static_cast<Number>(packet.part[i / kEach] >> (8 * sizeof(Number) * (i % kEach)));
}

template <class Number, class Bits>
LMCACHE_HD void add_number(Bits& packet, unsigned i, Number value) {
  packet = static_cast<Bits>(packet | static_cast<Bits>(value) << (8 * sizeof(Number) * i));
}

template <class Number>
LMCACHE_HD void add_number(Word<16>::Type& packet, unsigned i, Number value) {
  constexpr unsigned kEach = 4 / sizeof(Number);
  packet.part[i / kEach] |= uint32_t{value} << (8 * sizeof(Number) * (i % kEach));
}

// 16-bit numbers to e4m3, with one scale a run: the largest of it becomes 448. A run that holds an
// infinity has an infinite scale, and reads back as infinities' quotients do: not as numbers.
template <class Half>
struct Quantize {
  using From = uint16_t;
  using To = uint8_t;
  static constexpr bool kMakesScale = true;

  // The largest magnitude that a lane sees. NaNs count for nothing.
  template <unsigned kBy = 1, class Memory = Direct>
  LMCACHE_HD static float largest(uint64_t from, uint32_t n, uint32_t lane, uint32_t lanes,
                                  const Memory& memory = {}) {
    float most = 0;
    for (uint32_t i = lane; i < n / kBy; i += lanes) {
      using Type = Packet<From, kBy>;
      const Type packet = memory.template load<Type>(from + uint64_t{i} * sizeof(Type));
      LMCACHE_UNROLL
      for (unsigned j = 0; j < kBy; ++j) {
        const float magnitude = as_float(magnitude_of(Half::decode(number_of<From>(packet, j))));
        if (magnitude > most) most = magnitude;
      }
    }
    return most;
  }

  LMCACHE_HD static float scale(float largest) { return largest / E4m3::kMost; }

  LMCACHE_HD static To convert(From value, float scale) {
    const float number = Half::decode(value);
    return E4m3::encode(sign_of(number), magnitude_of(scale > 0 ? number / scale : number));
  }
};

template <class Half>
struct Dequantize {
  using From = uint8_t;
  using To = uint16_t;
  static constexpr bool kMakesScale = false;

  LMCACHE_HD static To convert(From value, float scale) {
    const float number = E4m3::decode(value);
    return Half::encode(sign_of(number) ^ sign_of(scale), magnitude_of(number * scale));
  }
};

// One lane's share of a run of n numbers, a multiple of kBy.
template <class How, unsigned kBy = 1, class Memory = Direct>
LMCACHE_HD void convert_run(uint64_t to, uint64_t from, uint32_t n, float scale, uint32_t lane,
                            uint32_t lanes, const Memory& memory = {}) {
  using From = Packet<typename How::From, kBy>;
  using To = Packet<typename How::To, kBy>;
  for (uint32_t i = lane; i < n / kBy; i += lanes) {
    const From packet = memory.template load<From>(from + uint64_t{i} * sizeof(From));
    To made{};
    LMCACHE_UNROLL
    for (unsigned j = 0; j < kBy; ++j)
      add_number(made, j, How::convert(number_of<typename How::From>(packet, j), scale));
    memory.store(to + uint64_t{i} * sizeof(To), made);
  }
}

// Where one run of an item is, and its scale.
struct Converted {
  uint64_t from;
  uint64_t to;
  float* scale;

  LMCACHE_HD Converted(const CopyParams& p, const Item& item, uint32_t run) {
    const Axis& inner = p.axis[kAxes - 1];
    from = item.at[kSrc] + offset(p, inner, kSrc, run);
    to = item.at[kDst] + offset(p, inner, kDst, run);
    scale = reinterpret_cast<float*>(item.at[kScale] + offset(p, inner, kScale, run));
  }
};

}  // namespace lmcache
