// Two layouts and a list of pages, made into what the kernels take.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "copy_params.hpp"
#include "layout.hpp"

namespace lmcache {

// What a caller asks for; `tokens` from each slot on, of one page.
struct CopyRequest {
  std::span<const int64_t> slots[kSides];
  uint32_t tokens = 1;
  uint32_t layers[2] = {0, 0};  // first, and one past the last
  Convert convert = Convert::kNone;
};

struct SlotError : std::out_of_range {
  using std::out_of_range::out_of_range;
};

class CopyPlan {
 public:
  static constexpr uint64_t kWord = 16;
  static constexpr uint64_t kShortRun = 4 << 10;
  static constexpr uint64_t kLongRun = 32 << 10;

  // Throws LayoutError or SlotError, which name the argument; nothing is copied then. The layouts
  // must outlive the plan. `scales` is looked at where numbers are converted.
  CopyPlan(const Layout& src, const Layout& dst, const Layout& scales, const CopyRequest& request)
      : request_(request) {
    layouts_ = {&src, &dst, &scales};
    sides_ = request.convert == Convert::kNone ? 2 : 3;
    require_alike();
    require_slots("src_slots", kSrc);
    require_slots("dst_slots", kDst);
    if (src.planes.empty() || request_.slots[kSrc].empty()) return;
    fold();
    for (size_t plane = 0; plane < src.planes.size();) {
      const size_t end = alike_until(plane);
      parts_.push_back(make_part(plane, end));
      plane = end;
    }
  }
  CopyPlan(const CopyPlan&) = delete;
  CopyPlan& operator=(const CopyPlan&) = delete;

  // One launch each: planes of another shape (V heads that are not as long as K's) have one apart.
  const std::vector<CopyParams>& parts() const { return parts_; }
  Convert convert() const { return request_.convert; }
  uint64_t bytes() const { return bytes_; }
  // How many runs there are, long ones whole.
  uint64_t runs() const { return runs_; }

 private:
  struct Tables {
    std::vector<uint64_t> span[kSides], row[kSides];
  };

  const Layout& layout(unsigned side) const { return *layouts_[side]; }
  // Quantised numbers bring their scales along in the destination's order, and back in the
  // source's.
  bool quantizes() const {
    return request_.convert == Convert::kBf16ToE4m3 || request_.convert == Convert::kFp16ToE4m3;
  }
  const std::span<const int64_t>& slots(unsigned side) const {
    return request_.slots[side != kScale ? side : quantizes() ? kDst : kSrc];
  }

  void require_alike() const {
    const Layout &src = layout(kSrc), &dst = layout(kDst);
    const auto require = [](bool holds, const char* what, uint64_t a, uint64_t b) {
      if (!holds)
        throw LayoutError(std::string("dst: ") + what + " differ, " + std::to_string(a) +
                          " in src and " + std::to_string(b) + " in dst");
    };
    require(src.planes.size() == dst.planes.size(), "planes", src.planes.size(), dst.planes.size());
    require(src.layers() == dst.layers(), "layers", src.layers(), dst.layers());
    require(src.heads == dst.heads, "heads", src.heads, dst.heads);
    const auto [from, to] = itemsizes();
    if (src.itemsize != from || dst.itemsize != to)
      throw LayoutError("dst: numbers of " + std::to_string(src.itemsize) +
                        " bytes do not become " + std::to_string(dst.itemsize) +
                        " by this conversion");
    for (size_t i = 0; i < src.planes.size(); ++i)
      require(src.planes[i].run / from == dst.planes[i].run / to, "numbers of a token and head",
              src.planes[i].run / from, dst.planes[i].run / to);
    if (request_.layers[0] > request_.layers[1] || request_.layers[1] > src.layers())
      throw LayoutError("layers: " + std::to_string(request_.layers[0]) + " to " +
                        std::to_string(request_.layers[1]) + " of " + std::to_string(src.layers()));
    if (runs_overlap(dst)) throw LayoutError("dst: its rows overlap");
    if (share_memory(src, dst)) throw LayoutError("dst: shares memory with src");
    if (sides_ == 3) require_scales();
  }

  void require_scales() const {
    const Layout &scales = layout(kScale), &beside = layout(quantizes() ? kDst : kSrc);
    if (scales.planes.size() != beside.planes.size() || scales.layers() != beside.layers() ||
        scales.heads != beside.heads || scales.page_size != beside.page_size ||
        scales.pages < beside.pages)
      throw LayoutError("scales: not of the same pages, planes, layers and heads as the e4m3 side");
    for (const Plane& plane : scales.planes)
      if (plane.run != sizeof(float)) throw LayoutError("scales: not one float32 a token and head");
    for (const Plane& plane : scales.planes)
      for (const uint64_t address : {plane.token_stride, plane.head_stride, plane.page_stride})
        if (address % sizeof(float) != 0) throw LayoutError("scales: not aligned");
    if (runs_overlap(scales)) throw LayoutError("scales: its rows overlap");
    if (share_memory(scales, layout(kSrc)) || share_memory(scales, layout(kDst)))
      throw LayoutError("scales: shares memory with src or dst");
  }

  std::pair<uint32_t, uint32_t> itemsizes() const {
    if (request_.convert == Convert::kNone) return {layout(kSrc).itemsize, layout(kSrc).itemsize};
    return quantizes() ? std::pair{2u, 1u} : std::pair{1u, 2u};
  }

  void require_slots(const std::string& name, Side side) const {
    const Layout& where = layout(side);
    const auto& given = request_.slots[side];
    if (given.size() != request_.slots[kSrc].size())
      throw LayoutError("dst_slots: " + std::to_string(given.size()) + " for " +
                        std::to_string(request_.slots[kSrc].size()) + " src_slots");
    if (given.size() >= uint64_t{1} << 31) throw LayoutError(name + ": too many for one copy");
    if (request_.tokens == 0 || request_.tokens > where.page_size)
      throw LayoutError("tokens: " + std::to_string(request_.tokens) + " of pages of " +
                        std::to_string(where.page_size));
    const auto slots = static_cast<int64_t>(where.slots());
    for (const int64_t slot : given) {
      if (slot < 0 || slot >= slots)
        throw SlotError(name + ": " + std::to_string(slot) + " is not one of " +
                        std::to_string(slots));
      if (slot % where.page_size + request_.tokens > where.page_size)
        throw SlotError(name + ": " + std::to_string(request_.tokens) + " tokens from " +
                        std::to_string(slot) + " reach into the next page");
    }
    if (side == kDst) require_each_once(name, slots);
  }

  void require_each_once(const std::string& name, uint64_t slots) const {
    const auto& given = request_.slots[kDst];
    const auto too_close = [this](int64_t a, int64_t b) {
      return b < a + int64_t{request_.tokens};
    };
    if (std::adjacent_find(given.begin(), given.end(), too_close) == given.end()) return;
    std::vector<bool> taken(slots);
    for (const int64_t slot : given)
      for (uint32_t token = 0; token < request_.tokens; ++token) {
        if (taken[slot + token])
          throw SlotError(name + ": slot " + std::to_string(slot + token) + " is in it twice");
        taken[slot + token] = true;
      }
  }

  // Slots that follow one another on both sides become one span.
  void fold() {
    const size_t count = request_.slots[kSrc].size();
    const uint32_t most = std::min(layout(kSrc).page_size, layout(kDst).page_size);
    uint32_t by = std::gcd(static_cast<uint32_t>(count), std::bit_floor(most / request_.tokens));
    while (by > 1 && !(follow(kSrc, by) && follow(kDst, by))) by /= 2;
    fold_ = std::max(by, 1u);
    tokens_ = request_.tokens * fold_;
  }

  bool follow(unsigned side, uint32_t by) const {
    const auto& given = request_.slots[side];
    const uint32_t page_size = layout(side).page_size;
    for (size_t i = 0; i < given.size(); i += by) {
      if (given[i] % page_size + int64_t{by} * request_.tokens > page_size) return false;
      for (size_t j = 1; j < by; ++j)
        if (given[i + j] != given[i] + static_cast<int64_t>(j) * request_.tokens) return false;
    }
    return true;
  }

  // Planes from `plane` on that have the same strides, and so go together.
  size_t alike_until(size_t plane) const {
    size_t end = plane + 1;
    const auto alike = [&](unsigned side) {
      const Plane &a = layout(side).planes[plane], &b = layout(side).planes[end];
      return a.run == b.run && a.token_stride == b.token_stride && a.head_stride == b.head_stride &&
             a.page_stride == b.page_stride;
    };
    while (end < layout(kSrc).planes.size() && alike(kSrc) && alike(kDst) &&
           (sides_ < 3 || alike(kScale)))
      ++end;
    return end;
  }

  CopyParams make_part(size_t plane, size_t end) {
    Tables& tables = *tables_.emplace_back(std::make_unique<Tables>());
    CopyParams params;
    for (unsigned side = 0; side < sides_; ++side) {
      fill_spans(tables.span[side], side, plane);
      fill_rows(tables.row[side], side, plane, end);
    }
    std::vector<Loop> loops = loops_of(plane);
    uint64_t run = layout(kSrc).planes[plane].run, whole = run;
    if (request_.convert == Convert::kNone) {
      grow(run, loops, tables);
      whole = run;
      cut(run, loops);
    }
    params.run = static_cast<uint32_t>(
        request_.convert == Convert::kNone ? run : run / layout(kSrc).itemsize);
    arrange(params, loops, tables);
    params.spans = static_cast<uint32_t>(tables.span[kSrc].size());
    params.width = request_.convert == Convert::kNone ? width_of(params, tables, run) : 1;
    params.words = Divisor(params.run / params.width);
    for (unsigned side = 0; side < sides_; ++side) {
      params.span[side] = tables.span[side].data();
      params.row[side] = tables.row[side].data();
    }
    require_countable(params);
    const uint64_t pieces = uint64_t{params.items()} * params.axis[kAxes - 1].count.by;
    bytes_ += pieces * run;
    runs_ += pieces * run / whole;
    return params;
  }

  void fill_spans(std::vector<uint64_t>& offsets, unsigned side, size_t plane) const {
    const Layout& where = layout(side);
    const Plane& shape = where.planes[plane];
    const auto& given = slots(side);
    offsets.reserve(given.size() / fold_);
    for (size_t i = 0; i < given.size(); i += fold_)
      offsets.push_back(where.page_offset(shape, given[i] / where.page_size) +
                        given[i] % where.page_size * shape.token_stride);
  }

  void fill_rows(std::vector<uint64_t>& rows, unsigned side, size_t plane, size_t end) const {
    for (; plane < end; ++plane) {
      const auto& layers = layout(side).planes[plane].layers;
      rows.insert(rows.end(), layers.begin() + request_.layers[0],
                  layers.begin() + request_.layers[1]);
    }
  }

  // An axis while it is being arranged.
  struct Loop {
    uint32_t count;
    bool is_row;
    uint64_t stride[kSides];
  };

  std::vector<Loop> loops_of(size_t plane) const {
    Loop token{tokens_, false, {}}, head{layout(kSrc).heads, false, {}};
    for (unsigned side = 0; side < sides_; ++side) {
      token.stride[side] = layout(side).planes[plane].token_stride;
      head.stride[side] = layout(side).planes[plane].head_stride;
    }
    return {token, head};
  }

  // Takes axes into the run for as long as one continues it on both sides.
  void grow(uint64_t& run, std::vector<Loop>& loops, Tables& tables) const {
    for (bool grown = true; grown;) {
      grown = grow_by_rows(run, tables);
      for (auto loop = loops.begin(); loop != loops.end(); ++loop)
        if (loop->count == 1 || continues(*loop, run)) {
          if (run * loop->count > UINT32_MAX) continue;
          run *= loop->count;
          loops.erase(loop);
          grown = true;
          break;
        }
    }
  }

  // Long runs are cut, so that many threads share one.
  static void cut(uint64_t& run, std::vector<Loop>& loops) {
    uint64_t piece = std::min(run, kLongRun);
    while (run % piece != 0 || (piece % kWord != 0 && run % kWord == 0)) --piece;
    if (piece < kShortRun || loops.size() > 1) return;
    if (piece < run) loops.push_back({static_cast<uint32_t>(run / piece), false, {piece, piece}});
    run = piece;
  }

  static bool continues(const Loop& loop, uint64_t run) {
    return loop.stride[kSrc] == run && loop.stride[kDst] == run;
  }

  // Rows that follow one another become one: all layers of a plane, and then the planes.
  bool grow_by_rows(uint64_t& run, Tables& tables) const {
    const size_t rows = tables.row[kSrc].size(), layers = request_.layers[1] - request_.layers[0];
    for (const size_t by : {rows, layers}) {
      if (by <= 1 || by > rows || rows % by != 0 || run * by > UINT32_MAX) continue;
      const auto follow = [&](unsigned side) {
        for (size_t i = 0; i < rows; ++i)
          if (i % by != 0 && tables.row[side][i] != tables.row[side][i - 1] + run) return false;
        return true;
      };
      if (!follow(kSrc) || !follow(kDst)) continue;
      for (unsigned side = 0; side < 2; ++side) {
        for (size_t i = 0; i < rows / by; ++i) tables.row[side][i] = tables.row[side][i * by];
        tables.row[side].resize(rows / by);
      }
      run *= by;
      return true;
    }
    return false;
  }

  // In the destination's order, the innermost last, so that it is written from its begin to its
  // end.
  void arrange(CopyParams& params, std::vector<Loop>& loops, const Tables& tables) const {
    const auto& rows = tables.row[kDst];
    Loop row{static_cast<uint32_t>(rows.size()), true, {}};
    row.stride[kDst] = rows.size() > 1 ? rows[1] - rows[0] : 0;
    loops.push_back(row);
    std::erase_if(loops, [](const Loop& loop) { return loop.count == 1 && !loop.is_row; });
    std::stable_sort(loops.begin(), loops.end(), [](const Loop& a, const Loop& b) {
      return (a.count > 1) != (b.count > 1) ? a.count == 1 : a.stride[kDst] > b.stride[kDst];
    });
    // A run of some length is an item by itself.
    if (params.run >= kShortRun && loops.size() < kAxes) loops.push_back({1, false, {}});
    for (size_t i = 0; i < loops.size(); ++i) {
      Axis& axis = params.axis[kAxes - loops.size() + i];
      axis.count = Divisor(loops[i].count);
      axis.is_row = loops[i].is_row;
      for (unsigned side = 0; side < sides_; ++side)
        axis.stride[side] = static_cast<int64_t>(loops[i].stride[side]);
    }
    for (size_t i = 0; i < kAxes - loops.size(); ++i) params.axis[i].count = Divisor(1);
  }

  static uint32_t width_of(const CopyParams& params, const Tables& tables, uint64_t run) {
    uint64_t all = run | 16;
    for (unsigned side = 0; side < 2; ++side) {
      for (const uint64_t offset : tables.span[side]) all |= offset;
      for (const uint64_t offset : tables.row[side]) all |= offset;
      for (const Axis& axis : params.axis)
        if (!axis.is_row && axis.count.by > 1) all |= static_cast<uint64_t>(axis.stride[side]);
    }
    return 1u << std::countr_zero(all);
  }

  static void require_countable(const CopyParams& params) {
    Wide items = params.spans, words = params.words.by;
    for (unsigned i = 0; i + 1 < kAxes; ++i) items *= params.axis[i].count.by;
    words *= params.axis[kAxes - 1].count.by;
    if (items > UINT32_MAX || words > UINT32_MAX)
      throw LayoutError("src_slots: too many for one copy; cut the list");
  }

  const CopyRequest request_;
  std::array<const Layout*, kSides> layouts_;
  unsigned sides_;
  uint32_t fold_ = 1;
  uint32_t tokens_ = 1;  // of a span
  std::vector<std::unique_ptr<Tables>> tables_;
  std::vector<CopyParams> parts_;
  uint64_t bytes_ = 0;
  uint64_t runs_ = 0;
};

}  // namespace lmcache
