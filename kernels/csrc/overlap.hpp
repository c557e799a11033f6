// Whether a layout's runs lie over one another: such a destination would hold what was written
// last.
//
// A *row* is one layer of one plane: its runs lie at its start and from there by strides, of pages,
// of tokens and of heads. Strides must nest: each is at least as long as all that the shorter ones
// reach. Rows that reach into one another must have the same longest stride; then only where they
// begin within that stride matters, and so on with the next one. All layouts of tensors are so.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "layout.hpp"

namespace lmcache {

// A plane's strides, the longest first, without those of a single index.
class Strides {
 public:
  Strides(const Layout& layout, const Plane& plane) {
    if (layout.pages_at.empty()) add(plane.page_stride, layout.pages);
    add(plane.token_stride, layout.page_size);
    add(plane.head_stride, layout.heads);
    std::sort(axes_.begin(), axes_.end(), std::greater<>());
    reach_.fill(plane.run);
    for (size_t i = kMost; i-- > 0;)
      if (axes_[i].second > 1)
        reach_[i] = reach_[i + 1] + Wide{axes_[i].first} * (axes_[i].second - 1);
  }

  // The longest one but for `depth`; 0 if there is none.
  uint64_t stride(unsigned depth) const { return depth < kMost ? axes_[depth].first : 0; }
  // Bytes from the first to behind the last run, of one index of the `depth` longest.
  Wide reach(unsigned depth) const { return reach_[depth]; }

  bool nest() const {
    for (unsigned i = 0; i < kMost; ++i)
      if (axes_[i].second > 1 && axes_[i].first < reach_[i + 1]) return false;
    return true;
  }

 private:
  static constexpr unsigned kMost = 3;

  void add(uint64_t stride, uint64_t count) {
    if (count > 1) axes_[used_++] = {stride, count};
  }

  std::array<std::pair<uint64_t, uint64_t>, kMost> axes_{};
  std::array<Wide, kMost + 1> reach_;
  unsigned used_ = 0;
};

struct Row {
  uint64_t start;
  const Strides* strides;
};

inline bool rows_overlap(std::span<Row> rows, unsigned depth);

// Of rows that reach into one another.
inline bool tangle_overlaps(std::span<Row> rows, unsigned depth) {
  const uint64_t begin = rows.front().start, stride = rows.front().strides->stride(depth);
  for (Row& row : rows) {
    if (stride == 0 || row.strides->stride(depth) != stride) return true;
    row.start = (row.start - begin) % stride;
    if (row.start + row.strides->reach(depth + 1) > stride) return true;
  }
  return rows_overlap(rows, depth + 1);
}

inline bool rows_overlap(std::span<Row> rows, unsigned depth) {
  std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.start < b.start; });
  for (size_t first = 0, end; first < rows.size(); first = end) {
    Wide until = 0;
    for (end = first; end < rows.size() && (end == first || rows[end].start < until); ++end)
      until = std::max(until, rows[end].start + rows[end].strides->reach(depth));
    if (end - first > 1 && tangle_overlaps(rows.subspan(first, end - first), depth)) return true;
  }
  return false;
}

// Pages that have an address each must not reach into one another.
inline bool pages_overlap(const Layout& layout, const std::vector<Row>& rows) {
  Wide begin = rows.front().start, end = 0;
  for (const Row& row : rows) {
    begin = std::min<Wide>(begin, row.start);
    end = std::max<Wide>(end, row.start + row.strides->reach(0));
  }
  std::vector<uint64_t> sorted = layout.pages_at;
  std::sort(sorted.begin(), sorted.end());
  const auto too_close = [&](uint64_t a, uint64_t b) { return b - a < end - begin; };
  return std::adjacent_find(sorted.begin(), sorted.end(), too_close) != sorted.end();
}

// Of a sound layout.
inline bool runs_overlap(const Layout& layout) {
  if (layout.pages == 0) return false;
  std::vector<Strides> strides;
  for (const Plane& plane : layout.planes) strides.emplace_back(layout, plane);
  for (const Strides& each : strides)
    if (!each.nest()) return true;
  std::vector<Row> rows;
  for (size_t i = 0; i < layout.planes.size(); ++i)
    for (const uint64_t start : layout.planes[i].layers) rows.push_back({start, &strides[i]});
  return pages_overlap(layout, rows) || rows_overlap(rows, 0);
}

}  // namespace lmcache
