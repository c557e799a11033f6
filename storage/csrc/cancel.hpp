// A flag that one thread raises to end what another one waits for.
#pragma once

#include <atomic>

namespace lmcache {

struct Cancel {
  std::atomic<bool> raised{false};
};

}  // namespace lmcache
