// A plan's parts as launches: which kernel, how many blocks, and the tables where a GPU reads them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "copy_plan.hpp"
#include "launch.hpp"

namespace lmcache {

struct Launch {
  std::string kernel;
  CopyLaunch params;
  uint32_t blocks;
};

struct LaunchShape {
  uint32_t blocks;
  uint32_t lanes;
};

inline constexpr uint32_t kMostBlocks = 1u << 16;  // so that no thread's number wraps around

inline bool quantizes(Convert convert) {
  return convert == Convert::kBf16ToE4m3 || convert == Convert::kFp16ToE4m3;
}

inline unsigned sides_of(Convert convert) { return convert == Convert::kNone ? 2 : kSides; }

inline uint32_t rows_of(const CopyParams& p) {
  for (const Axis& axis : p.axis)
    if (axis.is_row) return axis.count.by;
  return 0;
}

// How many lanes an item gets, and how many blocks there are of these groups.
//
// Lanes are as many as find a word each. A warp is enough for short items, since there are many of
// them; a long one (a whole page of page_first) gets as many lanes as have kWordsAhead words each,
// or few pages would keep few threads busy. Lanes that exchange registers are of one warp. Blocks
// are as many as the items fill, up to what the caller allows: the rest is the stride of the grid.
inline LaunchShape shape_of(uint32_t items, uint32_t words, bool in_a_warp, uint32_t most_blocks) {
  const uint32_t blocks = std::clamp<uint32_t>(most_blocks, 1, kMostBlocks);
  const uint32_t wanted = in_a_warp ? kWarp : std::max(kWarp, std::bit_floor(words / kWordsAhead));
  const uint32_t lanes =
      std::min({std::bit_floor(words), wanted, std::bit_floor(blocks * kThreads)});
  const uint32_t groups = std::min(items, blocks * kThreads / lanes);
  const uint64_t threads = uint64_t{groups} * lanes;
  return {static_cast<uint32_t>((threads + kThreads - 1) / kThreads), lanes};
}

// Whether all runs of a side begin at multiples of `bytes`.
inline bool aligned(const CopyParams& p, unsigned side, uint64_t bytes) {
  uint64_t all = 0;
  for (uint32_t i = 0; i < p.spans; ++i) all |= p.span[side][i];
  for (uint32_t i = 0; i < rows_of(p); ++i) all |= p.row[side][i];
  for (const Axis& axis : p.axis)
    if (!axis.is_row && axis.count.by > 1) all |= static_cast<uint64_t>(axis.stride[side]);
  return all % bytes == 0;
}

// Numbers that a conversion reads and writes as one word.
inline uint32_t at_once(const CopyParams& p, Convert convert) {
  const uint64_t from = quantizes(convert) ? 2 * kAtOnce : kAtOnce;
  const uint64_t to = quantizes(convert) ? kAtOnce : 2 * kAtOnce;
  const bool whole = p.run % kAtOnce == 0 && aligned(p, kSrc, from) && aligned(p, kDst, to);
  return whole ? kAtOnce : 1;
}

inline std::string kernel_of(const CopyParams& p, Convert convert) {
  if (convert == Convert::kNone) return "lmcache_copy_" + std::to_string(p.width);
  const bool brain = convert == Convert::kBf16ToE4m3 || convert == Convert::kE4m3ToBf16;
  return std::string("lmcache_") + (quantizes(convert) ? "quantize_" : "dequantize_") +
         (brain ? "bf16_" : "fp16_") + std::to_string(at_once(p, convert));
}

// Calls `visit` with every table of these parts; some parts share one.
template <class Parts, class Visit>
void for_each_table(Parts& parts, Convert convert, const Visit& visit) {
  for (auto& part : parts)
    for (unsigned side = 0; side < sides_of(convert); ++side) {
      visit(part.span[side], part.spans);
      visit(part.row[side], rows_of(part));
    }
}

// Names of all kernels that `kernel_of` may ask for, in order: what a cubin must have.
inline std::vector<std::string> kernel_names() {
#define LMCACHE_COPY(width) "lmcache_copy_" #width,
#define LMCACHE_CONVERT(name, Half, by) \
  "lmcache_quantize_" #name "_" #by, "lmcache_dequantize_" #name "_" #by,
  std::vector<std::string> names{LMCACHE_COPY_KERNELS(LMCACHE_COPY)
                                     LMCACHE_CONVERT_KERNELS(LMCACHE_CONVERT)};
#undef LMCACHE_COPY
#undef LMCACHE_CONVERT
  std::sort(names.begin(), names.end());
  return names;
}

inline uint64_t table_bytes(const std::vector<CopyParams>& parts, Convert convert) {
  std::unordered_set<const uint64_t*> seen;
  uint64_t words = 0;
  for_each_table(parts, convert, [&](const uint64_t* table, uint32_t count) {
    if (seen.insert(table).second) words += count;
  });
  return words * sizeof(uint64_t);
}

// Puts tables into memory that the CPU writes at `host` and the GPU reads at `device`, each once.
class TableWriter {
 public:
  TableWriter(uint64_t host, uint64_t device) : host_(host), device_(device) {}

  const uint64_t* put(const uint64_t* table, uint32_t count) {
    const auto [place, is_new] = placed_.try_emplace(table, device_ + used_);
    if (is_new) {
      std::memcpy(reinterpret_cast<void*>(host_ + used_), table, count * sizeof(uint64_t));
      used_ += count * sizeof(uint64_t);
    }
    return reinterpret_cast<const uint64_t*>(place->second);
  }

 private:
  const uint64_t host_, device_;
  uint64_t used_ = 0;
  std::unordered_map<const uint64_t*, uint64_t> placed_;
};

inline Launch launch_of(const CopyParams& part, Convert convert, uint32_t most_blocks) {
  const bool plain = convert == Convert::kNone;
  const uint32_t words = plain ? words_of_item(part) : part.run / at_once(part, convert);
  if (part.items() > 1u << 31 || words > 1u << 31)
    throw LayoutError("src_slots: too many for one launch; cut the list");
  const LaunchShape shape = shape_of(part.items(), words, quantizes(convert), most_blocks);
  return {kernel_of(part, convert), {part, shape.lanes}, shape.blocks};
}

// A launch of each part; `table_bytes` of `host` are written.
inline std::vector<Launch> launches_of(std::vector<CopyParams> parts, Convert convert,
                                       uint64_t host, uint64_t device, uint32_t most_blocks) {
  std::vector<Launch> launches;
  for (const CopyParams& part : parts) launches.push_back(launch_of(part, convert, most_blocks));
  TableWriter tables(host, device);
  for_each_table(parts, convert,
                 [&](const uint64_t*& table, uint32_t count) { table = tables.put(table, count); });
  for (size_t i = 0; i < parts.size(); ++i) launches[i].params.copy = parts[i];
  return launches;
}

}  // namespace lmcache
