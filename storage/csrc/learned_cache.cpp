// The default policy, simulated: the page of the lowest density (reuse.hpp) gives way, and none
// before what follows it.
//
// Pages that may go lie in lists by level and by the epoch of their last use. Their densities
// change slowly, so the list whose pages are worth least is looked for once in a while and gives
// all that goes until then.

#include <algorithm>
#include <limits>

#include "page_list.hpp"
#include "reuse.hpp"
#include "simulation.hpp"

namespace lmcache {

namespace {

constexpr uint32_t kEpochs = 64;      // that are told apart; all before them are one
constexpr uint32_t kOfRoom = 16;      // epochs in which as many pages are used as there is room for
constexpr uint32_t kFitEvery = 2048;  // uses
constexpr uint32_t kWatchEvery = 4;   // of so many pages one is learned from
constexpr uint64_t kWatchFor =
    1 << 20;  // uses, after which a page that did not return is watched no more

struct Page {
  uint64_t used = 0;   // the number of its last use, from 1 on; 0: none yet
  uint64_t epoch = 0;  // of its list
  uint32_t uses = 0;
  uint32_t parent = kNoPage;
  uint32_t children = 0;  // that are here
  uint16_t number = 0;    // of its class
  uint8_t level = 0;
  bool is_here = false, is_listed = false, is_watched = false;
};

class LearnedCache : public SimulatedCache {
 public:
  LearnedCache(uint32_t pages, uint32_t room)
      : room_(room),
        epoch_uses_(std::max<uint32_t>(1, room / kOfRoom)),
        pages_(pages),
        links_(pages),
        lists_(Reuse::kLevels * kEpochs) {}

  bool has(uint32_t page) const override { return pages_[page].is_here; }

  void use(Chain chain) override {
    const auto fresh = std::find_if(chain.begin(), chain.end(),
                                    [this](uint32_t page) { return pages_[page].uses == 0; });
    const auto known = static_cast<uint32_t>(fresh - chain.begin());
    const auto size = static_cast<uint32_t>(chain.size());
    uint32_t parent = kNoPage;
    for (uint32_t i = 0; i < size; ++i) {
      const Traits traits{pages_[chain[i]].uses + 1, size - known, i >= known, known <= 1,
                          i + 1 == size};
      use_one(chain[i], parent, traits);
      parent = chain[i];
    }
    if (now_ - learned_ >= kFitEvery) learn();
  }

 private:
  void use_one(uint32_t page, uint32_t parent, const Traits& traits) {
    ++now_;
    begin_epochs();
    Page& its = pages_[page];
    if (its.is_watched) reuse_.returned(its.number, waited(its));
    unlist(page);
    its.uses = traits.uses;
    its.used = now_;
    its.number = static_cast<uint16_t>(reuse_.class_of(traits));
    its.level = static_cast<uint8_t>(reuse_.level_of(its.number));
    watch(page);
    if (!its.is_here) take(page, parent);
    if (its.is_here && its.children == 0) list(page);
  }

  // A chain's pages are of use together: what is behind a page that is not here is not taken.
  void take(uint32_t page, uint32_t parent) {
    while (count_ >= room_ && evict(parent)) {
    }
    if (count_ >= room_ || (parent != kNoPage && !pages_[parent].is_here)) return;
    Page& its = pages_[page];
    its.is_here = true;
    its.parent = parent;
    ++count_;
    ++written_;
    if (parent == kNoPage) return;
    unlist(parent);
    ++pages_[parent].children;
  }

  // False: there is none that may go.
  bool evict(uint32_t keep) {
    uint32_t page = patience_ > 0 ? candidate(lists_[giving_], keep) : kNoPage;
    if (page == kNoPage) {
      choose(keep);
      page = candidate(lists_[giving_], keep);
    }
    if (page == kNoPage) return false;
    --patience_;
    unlist(page);
    Page& its = pages_[page];
    its.is_here = false;
    --count_;
    if (its.parent != kNoPage && --pages_[its.parent].children == 0) list(its.parent);
    return true;
  }

  uint32_t candidate(const PageList& list, uint32_t keep) const {
    return list.oldest == keep && keep != kNoPage ? links_.newer(keep) : list.oldest;
  }

  // The list whose pages are worth least.
  void choose(uint32_t keep) {
    double least = std::numeric_limits<double>::infinity();
    uint64_t oldest = 0;
    for (uint32_t i = 0; i < lists_.size(); ++i) {
      const uint32_t page = candidate(lists_[i], keep);
      if (page == kNoPage) continue;
      const uint64_t age = now_ - pages_[page].used;
      const double density = reuse_.density(i / kEpochs, age);
      if (density > least || (density == least && age <= oldest)) continue;
      least = density;
      oldest = age;
      giving_ = i;
    }
    patience_ = std::max<uint32_t>(1, epoch_uses_ / 4);
  }

  void begin_epochs() {
    for (const uint64_t epoch = now_ / epoch_uses_; epoch >= first_epoch_ + kEpochs;
         ++first_epoch_) {
      for (uint32_t level = 0; level < Reuse::kLevels; ++level) {
        PageList& from = lists_[level * kEpochs + first_epoch_ % kEpochs];
        for (uint32_t page = from.oldest; page != kNoPage; page = links_.newer(page)) {
          pages_[page].epoch = first_epoch_ + 1;
        }
        links_.append(lists_[level * kEpochs + (first_epoch_ + 1) % kEpochs], from);
      }
      patience_ = 0;
    }
  }

  PageList& list_of(const Page& page) {
    return lists_[page.level * kEpochs + page.epoch % kEpochs];
  }
  void list(uint32_t page) {
    Page& its = pages_[page];
    its.epoch = std::max(its.used / epoch_uses_, first_epoch_);
    its.is_listed = true;
    links_.push_newest(list_of(its), page);
  }
  void unlist(uint32_t page) {
    Page& its = pages_[page];
    if (!its.is_listed) return;
    its.is_listed = false;
    links_.unlink(list_of(its), page);
  }

  void watch(uint32_t page) {
    Page& its = pages_[page];
    if (its.is_watched || page * 2654435761u >> 8 & (kWatchEvery - 1)) return;
    its.is_watched = true;
    watched_.push_back(page);
  }

  // Told is what it waited since the last time that all were asked. Returns its age.
  uint64_t waited(const Page& page) {
    const uint64_t age = now_ - page.used;
    reuse_.waited(page.number, std::max(page.used, learned_) - page.used, age);
    return age;
  }

  void learn() {
    std::erase_if(watched_, [this](uint32_t page) {
      Page& its = pages_[page];
      its.is_watched = waited(its) <= kWatchFor;
      return !its.is_watched;
    });
    learned_ = now_;
    reuse_.fit();
  }

  uint32_t room_, count_ = 0;
  uint32_t epoch_uses_;
  uint64_t now_ = 0, learned_ = 0, first_epoch_ = 0;
  uint32_t giving_ = 0, patience_ = 0;
  std::vector<Page> pages_;
  PageLinks links_;
  std::vector<PageList> lists_;  // by level, and in it by epoch
  std::vector<uint32_t> watched_;
  Reuse reuse_;
};

}  // namespace

std::unique_ptr<SimulatedCache> make_learned_cache(uint32_t pages, uint32_t room) {
  return std::make_unique<LearnedCache>(pages, room);
}

}  // namespace lmcache
