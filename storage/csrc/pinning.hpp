// Telling CUDA about memory, so that the GPU's copy engines can read and write it in place.
#pragma once

#include <cstdint>
#include <string>

namespace lmcache {

// A range registered with CUDA, for as long as this lives. Uses the driver that the process has
// loaded, and no CUDA at build time (cuMemHostRegister, CUDA driver API, "Memory Management").
class Pinned {
 public:
  // library: of the driver. `why_not` says what was in the way; empty: the range is pinned.
  Pinned(void* base, uint64_t bytes, const std::string& library);
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

  const std::string& why_not() const { return why_not_; }

 private:
  void* base_;
  int (*unregister_)(void*) = nullptr;
  std::string why_not_;
};

}  // namespace lmcache
