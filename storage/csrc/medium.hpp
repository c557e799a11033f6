// Where the slots lie: memory that processes share, or a file.
#pragma once

#include <memory>
#include <string>

#include "device.hpp"

namespace lmcache {

class Medium {
 public:
  virtual ~Medium() = default;
  virtual void read(std::span<Transfer> pages, const Limits& limits) = 0;
  virtual void write(std::span<Transfer> pages, const Limits& limits) = 0;
  virtual int flush() = 0;  // errno
  // Where a slot's bytes can be had in place; null where they cannot.
  virtual const uint8_t* address(uint64_t offset) const = 0;
  virtual std::string describe() const = 0;
  // Makes memory known to CUDA, once; why that could not be, or nothing.
  virtual std::string pin(const std::string& driver) = 0;
};

// `threads` copy at once. The file lies in shared memory and is mapped.
std::unique_ptr<Medium> memory_medium(const std::string& path, uint64_t bytes, unsigned threads,
                                      bool huge_pages);
// Keeps nothing: the twin of the other two for measuring everything but them. Every read fails.
std::unique_ptr<Medium> no_medium();
std::unique_ptr<Medium> file_medium(const std::string& path, const DeviceOptions& options);

}  // namespace lmcache
