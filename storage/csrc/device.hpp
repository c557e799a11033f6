// Pages in slots of one file, moved by direct I/O.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "transfer.hpp"

namespace lmcache {

struct DeviceOptions {
  enum class Engine { Auto, Threads, Uring };
  // Straight from and into the caller's memory, or through buffers on huge pages, at the cost of a
  // copy. What does not fit direct I/O goes through buffers anyway.
  enum class Path { Auto, Straight, Buffers };

  unsigned queue_depth = 8;
  Engine engine = Engine::Auto;  // by measurement when the file is opened
  bool direct = true;
  Path path = Path::Auto;  // likewise, or at a read, once enough is written
};

class Device {
 public:
  // The file exists and its space is allocated. Throws std::system_error.
  Device(const std::string& path, const DeviceOptions& options);
  ~Device();  // when no call runs any more

  // Blocks until every page is done, has failed or was given up. Neighbouring slots in the order of
  // the batch move together. Several threads may call, and share the queue depth.
  void read(std::span<Transfer> pages, const Limits& limits);
  void write(std::span<Transfer> pages, const Limits& limits);
  int flush();  // what was written before survives a loss of power; returns errno

  bool direct() const;
  std::string why_not_direct() const;  // empty when direct
  bool through_buffers() const;        // ... goes what would fit direct I/O too
  const char* engine() const;
  uint64_t bytes() const;  // of the file, when it was opened

 private:
  struct Inside;
  std::unique_ptr<Inside> inside_;
};

}  // namespace lmcache
