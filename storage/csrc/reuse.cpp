#include "reuse.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

namespace lmcache {

namespace {

constexpr uint32_t kUses = 8, kGrown = 10, kOrigins = 3;
constexpr double kTraitPrior = 20;  // uses that a trait's factor of 1 weighs as much as
constexpr double kClassPrior = 50;  // and a class's factor that its traits give it
constexpr uint32_t kStepsOfTwo = 3;

uint8_t uses_value(uint32_t uses) {
  constexpr uint32_t kMost[kUses - 1] = {1, 2, 3, 5, 8, 16, 64};
  return static_cast<uint8_t>(std::lower_bound(kMost, std::end(kMost), uses) - kMost);
}

double factor_at(uint32_t level) {
  return std::exp2((static_cast<double>(level) - Reuse::kLevels / 2) / kStepsOfTwo);
}

}  // namespace

uint32_t Reuse::bin_of(uint64_t age) {
  if (age < 16) return static_cast<uint32_t>(age / 8);
  const uint32_t octave = std::bit_width(age) - 1;
  const uint32_t quarter = (age >> (octave - 2)) & 3;
  return std::min((octave - 4) * 4 + quarter + 2, kAges - 1);
}

double Reuse::begin_of(uint32_t bin) {
  if (bin <= 2) return bin * 8.0;
  return std::ldexp(1 + ((bin - 2) % 4) / 4.0, static_cast<int>((bin - 2) / 4 + 4));
}

Reuse::Reuse() : classes_(kUses * kGrown * kOrigins * 2) {
  for (auto& each : factors_) each.fill(1);
  for (uint32_t i = 0; i < classes_.size(); ++i) {
    const uint32_t of_rest = i / 2;
    classes_[i].values = {static_cast<uint8_t>(of_rest / kOrigins / kGrown),
                          static_cast<uint8_t>(of_rest / kOrigins % kGrown),
                          static_cast<uint8_t>(of_rest % kOrigins), static_cast<uint8_t>(i % 2)};
  }
}

uint32_t Reuse::class_of(const Traits& traits) const {
  const uint32_t grown = std::min<uint32_t>(std::bit_width(traits.grown), kGrown - 1);
  const uint32_t origin = !traits.is_new ? 0 : traits.is_first ? 1 : 2;
  return ((uses_value(traits.uses) * kGrown + grown) * kOrigins + origin) * 2 + traits.is_last;
}

uint32_t Reuse::level_of(uint32_t number) const {
  const double level = std::log2(classes_[number].factor) * kStepsOfTwo + kLevels / 2;
  return static_cast<uint32_t>(std::clamp(std::round(level), 0.0, kLevels - 1.0));
}

void Reuse::waited(uint32_t number, uint64_t from, uint64_t to) {
  Class& its = classes_[number];
  its.is_used = true;
  for (uint32_t bin = bin_of(from); bin <= bin_of(to); ++bin) {
    const double begin = std::max<double>(static_cast<double>(from), begin_of(bin));
    const double end = bin + 1 == kAges ? static_cast<double>(to)
                                        : std::min(static_cast<double>(to), begin_of(bin + 1));
    its.waits[bin] += std::max(0.0, end - begin);
  }
}

void Reuse::returned(uint32_t number, uint64_t age) {
  classes_[number].returns += 1;
  classes_[number].is_used = true;
  returns_[bin_of(age)] += 1;
}

void Reuse::fit() {
  fit_curve();
  fit_factors();
  fit_densities();
}

void Reuse::fit_curve() {
  std::array<double, kAges> expected{};
  for (const Class& each : classes_) {
    if (!each.is_used) continue;
    for (uint32_t bin = 0; bin < kAges; ++bin) expected[bin] += each.factor * each.waits[bin];
  }
  for (uint32_t bin = 0; bin < kAges; ++bin) {
    curve_[bin] = expected[bin] > 0 ? returns_[bin] / expected[bin] : 0;
  }
}

double Reuse::product_of(const Class& one) const {
  double product = 1;
  for (uint32_t i = 0; i < kTraits; ++i) product *= factors_[i][one.values[i]];
  return product;
}

// Each trait's factors in turn, so that its pages are expected to return as often as they did.
void Reuse::fit_factors() {
  constexpr int kRounds = 2;
  std::vector<double> expected(classes_.size());
  for (size_t i = 0; i < classes_.size(); ++i) {
    for (uint32_t bin = 0; classes_[i].is_used && bin < kAges; ++bin) {
      expected[i] += curve_[bin] * classes_[i].waits[bin];
    }
  }
  for (uint32_t turn = 0; turn < kRounds * kTraits; ++turn) {
    const uint32_t trait = turn % kTraits;
    std::array<double, kValues> did{}, should{};
    for (size_t i = 0; i < classes_.size(); ++i) {
      if (!classes_[i].is_used) continue;
      did[classes_[i].values[trait]] += classes_[i].returns;
      should[classes_[i].values[trait]] += product_of(classes_[i]) * expected[i];
    }
    for (uint32_t value = 0; value < kValues; ++value) {
      factors_[trait][value] *= (did[value] + kTraitPrior) / (should[value] + kTraitPrior);
    }
  }
  double all = 0, times = 0;
  for (size_t i = 0; i < classes_.size(); ++i) {
    Class& its = classes_[i];
    its.factor = (its.returns + kClassPrior) / (expected[i] + kClassPrior / product_of(its));
    double waits = 0;
    for (const double each : its.waits) waits += each;
    all += its.factor * waits;
    times += waits;
  }
  if (all <= 0) return;
  // 1 is the factor of a page that may be any: levels reach as far above it as below.
  for (Class& each : classes_) each.factor *= times / all;
  for (double& each : factors_[0]) each *= times / all;
}

void Reuse::fit_densities() {
  for (uint32_t level = 0; level < kLevels; ++level) {
    std::array<double, kAges> uses{}, kept{};
    double left = 1;  // of pages that came to this age
    for (uint32_t bin = 0; bin < kAges; ++bin) {
      const double rate = factor_at(level) * curve_[bin], width = begin_of(bin + 1) - begin_of(bin);
      const double part = -std::expm1(-rate * width);
      uses[bin] = left * part;
      kept[bin] = rate * width > 1e-12 ? left * part / rate : left * width;
      left *= 1 - part;
    }
    for (uint32_t from = 0; from < kAges; ++from) {
      double used = 0, time = 0, best = 0;
      for (uint32_t bin = from; bin < kAges; ++bin) {
        used += uses[bin];
        time += kept[bin];
        if (time > 0) best = std::max(best, used / time);
      }
      density_[level][from] = best;
    }
  }
}

}  // namespace lmcache
