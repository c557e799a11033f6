// Two layouts and a list of pages, made into what the kernels take.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "copy_params.hpp"
#include "layout.hpp"
#include "slots.hpp"

namespace lmcache {

// What a caller asks for; `tokens` from each slot on, of one page. The slots are a copy: somebody
// may write to the caller's own between the look at them and their use.
struct CopyRequest {
  SlotList slots[2];
  uint32_t tokens = 1;
  uint32_t layers[2] = {0, 0};  // first, and one past the last
  Convert convert = Convert::kNone;
};

class CopyPlan {
 public:
  static constexpr uint64_t kWord = 16;
  static constexpr uint64_t kShortRun = 4 << 10;
  static constexpr uint64_t kLongRun = 32 << 10;
  static constexpr uint64_t kCutsTried = 1024;

  // Throws LayoutError or SlotError, which name the argument; nothing is copied then. The layouts
  // must outlive the plan. `scales` is looked at where numbers are converted.
  CopyPlan(const Layout& src, const Layout& dst, const Layout& scales, CopyRequest request)
      : request_(std::move(request)) {
    layouts_ = {&src, &dst, &scales};
    sides_ = request_.convert == Convert::kNone ? 2 : 3;
    require_alike();
    require_slots();
    if (slots(kSrc).empty()) return;
    for (const Stretch& stretch : stretches())
      for (size_t plane = 0; plane < src.planes.size();) {
        const size_t end = alike_until(plane);
        parts_.push_back(make_part(stretch, plane, end));
        plane = end;
      }
  }
  CopyPlan(const CopyPlan&) = delete;
  CopyPlan& operator=(const CopyPlan&) = delete;

  // One launch each: planes of another shape (V heads that are not as long as K's) have one apart,
  // and so do tokens that are less than the pages before them.
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
  const SlotList& slots(unsigned side) const {
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
    if (request_.layers[0] >= request_.layers[1] || request_.layers[1] > src.layers())
      throw LayoutError("layers: " + std::to_string(request_.layers[0]) + " to " +
                        std::to_string(request_.layers[1]) + " of " + std::to_string(src.layers()));
    if (dst.overlaps) throw LayoutError("dst: its rows overlap");
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
    if (scales.overlaps) throw LayoutError("scales: its rows overlap");
    if (share_memory(scales, layout(kSrc)) || share_memory(scales, layout(kDst)))
      throw LayoutError("scales: shares memory with src or dst");
  }

  std::pair<uint32_t, uint32_t> itemsizes() const {
    if (request_.convert == Convert::kNone) return {layout(kSrc).itemsize, layout(kSrc).itemsize};
    return quantizes() ? std::pair{2u, 1u} : std::pair{1u, 2u};
  }

  void require_slots() const {
    if (slots(kSrc).size() != slots(kDst).size())
      throw LayoutError("dst_slots: " + std::to_string(slots(kDst).size()) + " for " +
                        std::to_string(slots(kSrc).size()) + " src_slots");
    require_pieces("src_slots", slots(kSrc), request_.tokens, layout(kSrc));
    require_pieces("dst_slots", slots(kDst), request_.tokens, layout(kDst));
    require_each_once("dst_slots", slots(kDst), request_.tokens, layout(kDst).slots());
  }

  // Some of the slots, of which each `by` follow one another on both sides and are one span.
  struct Stretch {
    size_t first, last;
    uint32_t by;
  };

  // As many as fill pages, and those that are left over: so that one token more does not take the
  // pages before it apart.
  std::vector<Stretch> stretches() const {
    const size_t count = slots(kSrc).size();
    const uint64_t most = std::min(layout(kSrc).page_size, layout(kDst).page_size);
    const uint64_t page = std::bit_floor(std::min<uint64_t>(most / request_.tokens, count));
    const size_t full = count - count % page;
    const Stretch head = folded(0, full, page), rest = folded(full, count, page);
    if (full == count || head.by == rest.by) return {{0, count, head.by}};
    return {head, rest};
  }

  Stretch folded(size_t first, size_t last, uint64_t most) const {
    auto by = static_cast<uint32_t>(std::gcd(last - first, most));
    const auto follow = [&](Side side) {
      return in_spans(slots(side), first, last, by, request_.tokens, layout(side).page_size);
    };
    while (by > 1 && !(follow(kSrc) && follow(kDst))) by /= 2;
    return {first, last, by};
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

  CopyParams make_part(const Stretch& stretch, size_t plane, size_t end) {
    Tables& tables = *tables_.emplace_back(std::make_unique<Tables>());
    CopyParams params;
    for (unsigned side = 0; side < sides_; ++side) {
      fill_spans(tables.span[side], side, plane, stretch);
      fill_rows(tables.row[side], side, plane, end);
    }
    std::vector<Loop> loops = loops_of(plane, request_.tokens * stretch.by);
    uint64_t run = layout(kSrc).planes[plane].run, whole = run;
    if (request_.convert == Convert::kNone) {
      grow(run, loops, tables);
      whole = run;
      cut(run, loops);
    }
    params.run = run_of(run);
    arrange(params, loops, tables);
    params.spans = static_cast<uint32_t>(tables.span[kSrc].size());
    if (request_.convert == Convert::kNone)
      params.width = width_of(params, tables, run);
    else
      require_aligned(params, tables);
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

  uint32_t run_of(uint64_t bytes) const {
    const uint64_t run = request_.convert == Convert::kNone ? bytes : bytes / layout(kSrc).itemsize;
    if (run > UINT32_MAX)
      throw LayoutError("src: a run of " + std::to_string(bytes) + " bytes is too long");
    return static_cast<uint32_t>(run);
  }

  void fill_spans(std::vector<uint64_t>& offsets, unsigned side, size_t plane,
                  const Stretch& stretch) const {
    const Layout& where = layout(side);
    const Plane& shape = where.planes[plane];
    const auto& given = slots(side);
    offsets.reserve((stretch.last - stretch.first) / stretch.by);
    for (size_t i = stretch.first; i < stretch.last; i += stretch.by)
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

  std::vector<Loop> loops_of(size_t plane, uint32_t tokens) const {
    Loop token{tokens, false, {}}, head{layout(kSrc).heads, false, {}};
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

  // Long runs are cut into as few pieces as will do, so that many threads share one. Words that fit
  // the run fit its pieces.
  static void cut(uint64_t& run, std::vector<Loop>& loops) {
    if (run <= kLongRun || loops.size() > 1) return;
    const uint64_t words = run >> std::countr_zero(run | kWord);
    const uint64_t fewest = (run + kLongRun - 1) / kLongRun;
    for (uint64_t n = fewest; n < fewest + kCutsTried && run / n >= kShortRun; ++n)
      if (words % n == 0) {
        run /= n;
        loops.push_back({static_cast<uint32_t>(n), false, {run, run}});
        return;
      }
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

  // Where a side's runs begin, all together: a multiple of what all these addresses are one of.
  static uint64_t addresses(const CopyParams& params, const Tables& tables, unsigned side) {
    uint64_t all = 0;
    for (const uint64_t offset : tables.span[side]) all |= offset;
    for (const uint64_t offset : tables.row[side]) all |= offset;
    for (const Axis& axis : params.axis)
      if (!axis.is_row && axis.count.by > 1) all |= static_cast<uint64_t>(axis.stride[side]);
    return all;
  }

  static uint32_t width_of(const CopyParams& params, const Tables& tables, uint64_t run) {
    return 1u << std::countr_zero(run | kWord | addresses(params, tables, kSrc) |
                                  addresses(params, tables, kDst));
  }

  // A GPU's load of a number from another address ends all that it does.
  void require_aligned(const CopyParams& params, const Tables& tables) const {
    constexpr std::array<const char*, kSides> kNames = {"src", "dst", "scales"};
    const std::array<uint32_t, kSides> sizes = {itemsizes().first, itemsizes().second,
                                                sizeof(float)};
    for (unsigned side = 0; side < kSides; ++side)
      if (addresses(params, tables, side) % sizes[side] != 0)
        throw LayoutError(std::string(kNames[side]) + ": not aligned, numbers of " +
                          std::to_string(sizes[side]) + " bytes are to be converted");
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
  std::vector<std::unique_ptr<Tables>> tables_;
  std::vector<CopyParams> parts_;
  uint64_t bytes_ = 0;
  uint64_t runs_ = 0;
};

}  // namespace lmcache
