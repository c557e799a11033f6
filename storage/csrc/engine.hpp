// Who carries the requests of a batch to the device.
#pragma once

#include "batch.hpp"

namespace lmcache::io {

class Engine {
 public:
  virtual ~Engine() = default;
  // Returns when every request is done, failed or given up. Any number of threads may call it.
  virtual void run(Batch& batch) = 0;
  virtual const char* name() const = 0;
};

}  // namespace lmcache::io
