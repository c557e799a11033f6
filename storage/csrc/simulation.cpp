#include "simulation.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>

#include "page_list.hpp"

namespace lmcache {

namespace {

// Each page by itself: what the textbook's policies know.
class PageCache : public SimulatedCache {
 public:
  PageCache(uint32_t pages, uint32_t room) : room_(room), here_(pages) {}
  bool has(uint32_t page) const override { return here_[page]; }
  void use(Chain chain) override {
    for (const uint32_t page : chain) {
      if (here_[page]) {
        hit(page);
      } else {
        miss(page);
      }
    }
  }

 protected:
  virtual void hit(uint32_t page) = 0;
  virtual void miss(uint32_t page) = 0;

  void come(uint32_t page) {
    here_[page] = true;
    ++count_;
    ++written_;
  }
  void go(uint32_t page) {
    here_[page] = false;
    --count_;
  }
  bool is_full() const { return count_ >= room_; }

  uint32_t room_, count_ = 0;
  std::vector<bool> here_;
};

class LruCache : public PageCache {
 public:
  LruCache(uint32_t pages, uint32_t room) : PageCache(pages, room), links_(pages) {}

 protected:
  void hit(uint32_t page) override {
    links_.unlink(list_, page);
    links_.push_newest(list_, page);
  }
  void miss(uint32_t page) override {
    if (is_full()) {
      const uint32_t victim = list_.oldest;
      links_.unlink(list_, victim);
      go(victim);
    }
    come(page);
    links_.push_newest(list_, page);
  }

  PageLinks links_;
  PageList list_;
};

// LRU that takes a page when it is used for the second time.
class SecondTouchCache : public LruCache {
 public:
  SecondTouchCache(uint32_t pages, uint32_t room) : LruCache(pages, room), seen_(pages) {}

 protected:
  void miss(uint32_t page) override {
    if (seen_[page]) LruCache::miss(page);
    seen_[page] = true;
  }

 private:
  std::vector<bool> seen_;
};

// Y. Zhang et al., "SIEVE", NSDI '24.
class SieveCache : public PageCache {
 public:
  SieveCache(uint32_t pages, uint32_t room)
      : PageCache(pages, room), links_(pages), visited_(pages) {}

 protected:
  void hit(uint32_t page) override { visited_[page] = true; }
  void miss(uint32_t page) override {
    if (is_full()) evict();
    come(page);
    visited_[page] = false;
    links_.push_newest(list_, page);
  }

 private:
  void evict() {
    if (hand_ == kNoPage) hand_ = list_.oldest;
    while (visited_[hand_]) {
      visited_[hand_] = false;
      hand_ = links_.newer(hand_) == kNoPage ? list_.oldest : links_.newer(hand_);
    }
    const uint32_t victim = hand_;
    hand_ = links_.newer(victim);
    links_.unlink(list_, victim);
    go(victim);
  }

  PageLinks links_;
  PageList list_;
  std::vector<bool> visited_;
  uint32_t hand_ = kNoPage;
};

// J. Yang et al., "FIFO queues are all you need for cache eviction" (S3-FIFO), SOSP '23.
class S3FifoCache : public PageCache {
 public:
  S3FifoCache(uint32_t pages, uint32_t room)
      : PageCache(pages, room),
        small_room_(std::max<uint32_t>(1, room / 10)),
        links_(pages),
        uses_(pages),
        in_small_(pages),
        gone_(pages) {}

 protected:
  void hit(uint32_t page) override { uses_[page] = std::min<uint8_t>(3, uses_[page] + 1); }
  void miss(uint32_t page) override {
    while (is_full()) evict();
    come(page);
    uses_[page] = 0;
    const bool again = gone_[page] != 0 && went_ - gone_[page] < room_ - small_room_;
    push(page, !again);
  }

 private:
  void push(uint32_t page, bool small) {
    in_small_[page] = small;
    links_.push_newest(small ? small_ : main_, page);
  }
  void evict() {
    const bool from_small = main_.oldest == kNoPage || small_.count >= small_room_;
    PageList& from = from_small && small_.oldest != kNoPage ? small_ : main_;
    const uint32_t page = from.oldest;
    const bool is_small = &from == &small_;
    links_.unlink(from, page);
    if (is_small ? uses_[page] > 1 : uses_[page] > 0) {
      uses_[page] = is_small ? 0 : static_cast<uint8_t>(uses_[page] - 1);
      push(page, false);
      return;
    }
    if (is_small) gone_[page] = ++went_;
    go(page);
  }

  uint32_t small_room_;
  PageLinks links_;
  PageList small_, main_;
  std::vector<uint8_t> uses_;
  std::vector<bool> in_small_;
  std::vector<uint64_t> gone_;  // which eviction from `small_` was its last; 0: none
  uint64_t went_ = 0;
};

// L. A. Belady's optimum ("A study of replacement algorithms", 1966): it knows when each page is
// used next, and does not take what is used later than all that it has. Pages of a prefix come to
// it in one request, so it keeps whole prefixes.
class BeladyCache : public SimulatedCache {
 public:
  BeladyCache(const Trace& trace, uint32_t room)
      : room_(room), next_(trace.pages.size()), due_(trace.count, kNever) {
    std::vector<uint64_t> later(trace.count, kNever);
    for (size_t i = trace.pages.size(); i-- > 0;) {
      next_[i] = later[trace.pages[i]];
      later[trace.pages[i]] = i;
    }
  }
  bool has(uint32_t page) const override { return due_[page] != kNever; }
  void use(Chain chain) override {
    for (const uint32_t page : chain) {
      const uint64_t next = next_[at_++];
      const bool was_here = has(page);
      if (was_here) here_.erase({due_[page], page});
      due_[page] = kNever;
      if (next == kNever) continue;
      here_.insert({next, page});
      due_[page] = next;
      written_ += !was_here;
      if (here_.size() <= room_) continue;
      const auto last = std::prev(here_.end());
      written_ -= last->second == page && !was_here;
      due_[last->second] = kNever;
      here_.erase(last);
    }
  }

 private:
  static constexpr uint64_t kNever = std::numeric_limits<uint64_t>::max();
  uint32_t room_;
  std::vector<uint64_t> next_, due_;
  std::set<std::pair<uint64_t, uint32_t>> here_;
  size_t at_ = 0;
};

constexpr uint32_t kPagesMost = 1u << 31;

using Make = std::function<std::unique_ptr<SimulatedCache>(const Trace&, uint32_t)>;

template <typename Cache>
std::unique_ptr<SimulatedCache> of_pages(const Trace& trace, uint32_t room) {
  return std::make_unique<Cache>(trace.count, room);
}

const std::map<std::string, Make>& makers() {
  static const std::map<std::string, Make> known = {
      {"belady", [](const Trace& trace,
                    uint32_t room) { return std::make_unique<BeladyCache>(trace, room); }},
      {"default",
       [](const Trace& trace, uint32_t room) { return make_learned_cache(trace.count, room); }},
      {"lru", of_pages<LruCache>},
      {"s3-fifo", of_pages<S3FifoCache>},
      {"second-touch", of_pages<SecondTouchCache>},
      {"sieve", of_pages<SieveCache>},
  };
  return known;
}

}  // namespace

Trace::Trace(std::vector<uint32_t> its_pages, std::vector<uint64_t> its_ends)
    : pages(std::move(its_pages)), ends(std::move(its_ends)) {
  if (!std::is_sorted(ends.begin(), ends.end()) ||
      (ends.empty() ? 0 : ends.back()) != pages.size()) {
    throw std::invalid_argument("ends do not divide the pages into requests");
  }
  for (const uint32_t page : pages) {
    if (page >= kPagesMost) throw std::invalid_argument("pages are to be numbered from 0 on");
    count = std::max(count, page + 1);
  }
}

std::vector<std::string> simulated_policies() {
  std::vector<std::string> names;
  for (const auto& [name, make] : makers()) names.push_back(name);
  return names;
}

Outcome simulate(const Trace& trace, uint32_t room, const std::string& policy) {
  const auto maker = makers().find(policy);
  if (maker == makers().end()) throw std::invalid_argument("no such policy: " + policy);
  if (room == 0) throw std::invalid_argument("a cache has room for at least one page");
  const auto cache = maker->second(trace, room);
  Outcome outcome;
  uint64_t begin = 0;
  for (const uint64_t end : trace.ends) {
    const Chain chain(trace.pages.data() + begin, end - begin);
    for (const uint32_t page : chain) {
      if (!cache->has(page)) break;
      ++outcome.hits;
    }
    cache->use(chain);
    begin = end;
  }
  outcome.references = trace.pages.size();
  outcome.written = cache->written();
  return outcome;
}

}  // namespace lmcache
