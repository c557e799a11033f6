// Who of the processes that share a store is alive. Each holds a lock on a byte of a file; the
// kernel drops it when the process ends, however it ends, and whatever PID namespace it lived in.
#pragma once

#include <cstdint>
#include <string>

namespace lmcache {

class Owners {
 public:
  explicit Owners(const std::string& path);  // takes a number of its own; throws std::system_error
  ~Owners();
  Owners(const Owners&) = delete;
  Owners& operator=(const Owners&) = delete;

  uint16_t self() const { return self_; }
  bool alive(uint16_t owner) const;

 private:
  int file_;
  uint16_t self_ = 0;
};

}  // namespace lmcache
