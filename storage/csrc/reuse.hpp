// How soon a page is used again, learned from pages that were.
//
// A page is of a *class*, by what its last use showed of its chain. The rate at which a page is
// used again is taken as a curve over its age that all pages have in common, times a factor of its
// class (proportional hazards: D. R. Cox, "Regression models and life-tables", 1972); a class's
// factor is the product of one for each of its traits, moved towards what its own pages did, the
// more of them there were. Nothing is set by hand but how fine all this is.
//
// What a page is worth is its *density*: the uses to be expected for the time it must be kept for
// them, over the best time to keep it (J. C. Gittins's index; as hit density in N. Beckmann, H.
// Chen, A. Cidon, "LHD", NSDI '18). The page of the lowest density is the one to give up. Ages are
// counted in uses of all pages, so nothing depends on a clock's unit.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace lmcache {

// What a use showed of a page.
struct Traits {
  uint32_t uses;  // of the page, this one included
  uint32_t
      grown;    // pages that nobody had seen before, behind what was known of this request's chain
  bool is_new;  // the page is one of those
  bool is_first;  // next to nothing of the chain was known
  bool is_last;   // the page is the request's last
};

class Reuse {
 public:
  static constexpr uint32_t kAges = 80;    // bins: four for each doubling
  static constexpr uint32_t kLevels = 24;  // of factors: three for each doubling

  Reuse();
  uint32_t class_of(const Traits& traits) const;
  // The factor of a class by now, in steps; what is kept of a page after its use.
  uint32_t level_of(uint32_t number) const;
  // A page of this class got older, and was not used meanwhile.
  void waited(uint32_t number, uint64_t from, uint64_t to);
  // It was used again.
  void returned(uint32_t number, uint64_t age);
  // Learn from what was told; until then all densities are 0.
  void fit();
  double density(uint32_t level, uint64_t age) const { return density_[level][bin_of(age)]; }

  static uint32_t bin_of(uint64_t age);
  static double begin_of(uint32_t bin);

 private:
  static constexpr uint32_t kTraits = 4, kValues = 10;

  struct Class {
    std::array<uint8_t, kTraits> values;
    double returns = 0;
    std::array<double, kAges> waits{};
    double factor = 1;
    bool is_used = false;
  };

  double product_of(const Class& one) const;
  void fit_curve();
  void fit_factors();
  void fit_densities();

  std::vector<Class> classes_;
  std::array<double, kAges> returns_{}, curve_{};
  std::array<std::array<double, kValues>, kTraits> factors_;
  std::array<std::array<double, kAges>, kLevels> density_{};
};

}  // namespace lmcache
