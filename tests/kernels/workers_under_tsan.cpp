// Several callers share one pool and move pages; test_workers.py runs it under the thread
// sanitizer.
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

#include "pages.hpp"
#include "workers.hpp"

namespace {

constexpr size_t kPages = 8;
constexpr size_t kBytes = 20'000;

using Memory = std::vector<std::vector<uint8_t>>;

void move_batch(lmcache::Workers& workers, Memory& from, Memory& to) {
  std::vector<uint64_t> sums(kPages);  // the caller reads what the pool's threads wrote
  workers.run(kPages, [&](size_t i) {
    const lmcache::Segment segment{from[i].data(), kBytes};
    sums[i] = lmcache::gather({&segment, 1}, to[i].data(), i);
  });
  for (size_t i = 0; i < kPages; ++i)
    if (to[i] != from[i] || sums[i] != lmcache::checksum(to[i], i)) throw std::logic_error("lost");
}

void fail_batch(lmcache::Workers& workers) {
  try {
    workers.run(kPages, [](size_t) { throw std::runtime_error("wanted"); });
  } catch (const std::runtime_error&) {
    return;
  }
  throw std::logic_error("the exception was lost");
}

void call(lmcache::Workers& workers, uint8_t byte) {
  Memory from(kPages, std::vector<uint8_t>(kBytes, byte));
  Memory to(kPages, std::vector<uint8_t>(kBytes));
  for (int round = 0; round < 100; ++round) {
    move_batch(workers, from, to);
    fail_batch(workers);
  }
}

}  // namespace

int main() {
  lmcache::Workers workers(3);
  std::vector<std::jthread> callers;
  for (uint8_t byte = 1; byte <= 4; ++byte)
    callers.emplace_back([&workers, byte] { call(workers, byte); });
}
