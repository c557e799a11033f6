// Where the numbers of pages lie in some memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace lmcache {

__extension__ typedef unsigned __int128 Wide;  // what no sum of strides overflows

// K, or V, or a latent row, or the scales beside one. All strides in bytes.
struct Plane {
  std::vector<uint64_t> layers;  // where page 0, token 0, head 0 of each layer is
  uint64_t page_stride = 0;      // unused where each page has an address of its own
  uint64_t token_stride = 0;
  uint64_t head_stride = 0;
  uint64_t run = 0;  // one token's and head's bytes, contiguous
};

struct MemoryRange {
  uint64_t start;
  uint64_t end;
};

struct LayoutError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

class Layout {
 public:
  std::vector<Plane> planes;
  std::vector<uint64_t> pages_at;  // where each page begins, or empty: by the planes' strides
  uint64_t pages = 0;
  uint32_t page_size = 0;  // tokens
  uint32_t heads = 0;
  uint32_t itemsize = 0;            // bytes of a number
  std::vector<MemoryRange> memory;  // all that may be touched
  bool overlaps = false;            // a run lies over another one (overlap.hpp)

  // Everything that a copy relies on. Throws LayoutError. Afterwards the memory's ranges are in
  // order, and apart.
  void require_sound() {
    if (planes.empty()) throw LayoutError("planes: there is none");
    if (page_size == 0) throw LayoutError("page_size: must be at least 1");
    if (heads == 0) throw LayoutError("heads: must be at least 1");
    if (itemsize == 0) throw LayoutError("itemsize: must be at least 1");
    if (!pages_at.empty() && pages_at.size() != pages)
      throw LayoutError("pages_at: " + std::to_string(pages_at.size()) + " addresses for " +
                        std::to_string(pages) + " pages");
    if (Wide{pages} * page_size >= Wide{1} << 63)
      throw LayoutError("pages: " + std::to_string(pages) + " of " + std::to_string(page_size) +
                        " tokens are more than slots have numbers");
    merge_memory();
    for (const Plane& plane : planes) require_sound(plane);
  }

  size_t layers() const { return planes.front().layers.size(); }
  uint64_t slots() const { return pages * page_size; }
  // Of a slot's page; the planes' layers are added to it.
  uint64_t page_offset(const Plane& plane, uint64_t page) const {
    return pages_at.empty() ? page * plane.page_stride : pages_at[page];
  }

 private:
  void merge_memory() {
    for (const MemoryRange& range : memory)
      if (range.end < range.start) throw LayoutError("memory: a range ends before it begins");
    std::erase_if(memory, [](const MemoryRange& range) { return range.start == range.end; });
    std::sort(memory.begin(), memory.end(),
              [](const MemoryRange& a, const MemoryRange& b) { return a.start < b.start; });
    size_t kept = 0;
    for (const MemoryRange range : memory)
      if (kept > 0 && range.start <= memory[kept - 1].end)
        memory[kept - 1].end = std::max(memory[kept - 1].end, range.end);
      else
        memory[kept++] = range;
    memory.resize(kept);
  }

  void require_sound(const Plane& plane) const {
    if (plane.layers.size() != layers())
      throw LayoutError("planes: one has " + std::to_string(plane.layers.size()) +
                        " layers, another " + std::to_string(layers()));
    if (plane.layers.empty()) throw LayoutError("planes: one has no layers");
    if (plane.run == 0 || plane.run % itemsize != 0)
      throw LayoutError("run: " + std::to_string(plane.run) + " bytes are no numbers of " +
                        std::to_string(itemsize));
    if (pages == 0) return;
    const Wide within = Wide{plane.token_stride} * (page_size - 1) +
                        Wide{plane.head_stride} * (heads - 1) + plane.run;
    if (pages_at.empty()) {
      for (const uint64_t layer : plane.layers)
        require_inside(layer, within + Wide{plane.page_stride} * (pages - 1));
      return;
    }
    const auto [first, last] = std::minmax_element(plane.layers.begin(), plane.layers.end());
    for (const uint64_t page : pages_at)
      require_inside(Wide{page} + *first, *last - *first + within);
  }

  void require_inside(Wide start, Wide bytes) const {
    const auto after = std::upper_bound(
        memory.begin(), memory.end(), start,
        [](Wide address, const MemoryRange& range) { return address < range.start; });
    if (after != memory.begin()) {
      const MemoryRange& range = *(after - 1);
      if (start + bytes <= range.end) return;
    }
    throw LayoutError("memory: pages, layers, tokens or heads reach outside it");
  }
};

// Two of them have memory in common.
inline bool share_memory(const Layout& one, const Layout& other) {
  auto a = one.memory.begin(), b = other.memory.begin();
  while (a != one.memory.end() && b != other.memory.end()) {
    if (a->start < b->end && b->start < a->end) return true;
    if (a->end < b->end)
      ++a;
    else
      ++b;
  }
  return false;
}

}  // namespace lmcache
