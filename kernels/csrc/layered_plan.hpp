// A copy a layer at a time, planned once: layers differ only in where their rows begin.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "copy_plan.hpp"
#include "launch_plan.hpp"

namespace lmcache {

class LayeredPlan {
 public:
  // Throws what CopyPlan throws; the layouts must outlive the plan.
  LayeredPlan(const Layout& src, const Layout& dst, const Layout& scales,
              const CopyRequest& request)
      : layouts_{&src, &dst, &scales}, request_(request) {
    if (request.layers[1] > src.layers())
      throw LayoutError("layers: " + std::to_string(request.layers[0]) + " to " +
                        std::to_string(request.layers[1]) + " of " + std::to_string(src.layers()));
    first_ = plan_of(request.layers[0]);
    for (uint32_t layer = request.layers[0]; layer < request.layers[1]; ++layer) add(layer);
  }
  LayeredPlan(const LayeredPlan&) = delete;
  LayeredPlan& operator=(const LayeredPlan&) = delete;

  // Those of the first layer, then as many of the next one, and so on.
  const std::vector<CopyParams>& parts() const { return parts_; }
  uint32_t layers() const { return request_.layers[1] - request_.layers[0]; }
  Convert convert() const { return request_.convert; }
  // Of one layer.
  uint64_t bytes() const { return first_->bytes(); }
  uint64_t runs() const { return first_->runs(); }

 private:
  std::shared_ptr<CopyPlan> plan_of(uint32_t layer) {
    CopyRequest one = request_;
    one.layers[0] = layer;
    one.layers[1] = layer + 1;
    return plans_.emplace_back(
        std::make_shared<CopyPlan>(*layouts_[kSrc], *layouts_[kDst], *layouts_[kScale], one));
  }

  void add(uint32_t layer) {
    const bool same = layer == request_.layers[0];
    if (!same && !follows(layer)) {
      const auto& parts = plan_of(layer)->parts();
      parts_.insert(parts_.end(), parts.begin(), parts.end());
      return;
    }
    size_t plane = 0;
    for (const CopyParams& part : first_->parts()) parts_.push_back(moved(part, layer, plane));
  }

  // Whether this layer's rows follow from the first layer's: each plane has a row of its own, or
  // planes that were joined to one run are as far from their first layer as each other.
  bool follows(uint32_t layer) const {
    size_t rows = 0;
    for (const CopyParams& part : first_->parts()) rows += rows_of(part);
    const size_t planes = layouts_[kSrc]->planes.size();
    if (rows == planes) return true;
    for (unsigned side = 0; side < sides_of(convert()); ++side)
      for (size_t plane = 1; plane < planes; ++plane)
        if (distance(side, plane, layer) != distance(side, 0, layer)) return false;
    return true;
  }

  uint64_t distance(unsigned side, size_t plane, uint32_t layer) const {
    const auto& layers = layouts_[side]->planes[plane].layers;
    return layers[layer] - layers[request_.layers[0]];
  }

  // A part of the first layer at another one; `plane` is that of its first row, and then that
  // behind its last one. Joined planes move alike, so any of them will do.
  CopyParams moved(CopyParams part, uint32_t layer, size_t& plane) {
    const uint32_t rows = rows_of(part);
    for (unsigned side = 0; side < sides_of(convert()); ++side) {
      auto& table = *tables_.emplace_back(std::make_unique<std::vector<uint64_t>>(rows));
      for (uint32_t i = 0; i < rows; ++i)
        table[i] = part.row[side][i] + distance(side, plane + i, layer);
      part.row[side] = table.data();
    }
    plane += rows;
    if (convert() == Convert::kNone) fit_word(part);
    return part;
  }

  // The longest word that all of this layer's addresses and the run are multiples of.
  static void fit_word(CopyParams& part) {
    uint32_t width = CopyPlan::kWord;
    while (part.run % width != 0 || !aligned(part, kSrc, width) || !aligned(part, kDst, width))
      width /= 2;
    part.width = width;
    part.words = Divisor(part.run / width);
  }

  const Layout* layouts_[kSides];
  const CopyRequest request_;
  std::vector<std::shared_ptr<CopyPlan>> plans_;
  std::shared_ptr<const CopyPlan> first_;
  std::vector<std::unique_ptr<std::vector<uint64_t>>> tables_;
  std::vector<CopyParams> parts_;
};

}  // namespace lmcache
