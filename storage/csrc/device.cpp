#include "device.hpp"

#include <algorithm>
#include <utility>

#include "path.hpp"
#include "probe.hpp"
#include "thread_engine.hpp"
#include "uring_engine.hpp"

namespace lmcache {

using namespace io;

namespace {

std::unique_ptr<Engine> uring_if_any(unsigned depth) {
  try {
    return std::make_unique<UringEngine>(depth);
  } catch (const std::system_error&) {
    return nullptr;
  }
}

std::unique_ptr<Engine> faster_engine(SlotFile& file, BufferPool& buffers, unsigned depth) {
  std::unique_ptr<Engine> threads = std::make_unique<ThreadEngine>(depth);
  const Range range = file.written(Probe::kLeastBytes);
  if (range.begin == range.end) return threads;  // a new store: nothing to measure by
  auto uring = uring_if_any(depth);
  Probe probe(file, buffers, depth, range);
  if (uring && probe.is_faster({*uring, false}, {*threads, false})) return uring;
  return threads;
}

std::unique_ptr<Engine> make_engine(SlotFile& file, BufferPool& buffers, unsigned depth,
                                    DeviceOptions::Engine wanted) {
  switch (wanted) {
    case DeviceOptions::Engine::Threads:
      return std::make_unique<ThreadEngine>(depth);
    case DeviceOptions::Engine::Uring:
      return std::make_unique<UringEngine>(depth);
    case DeviceOptions::Engine::Auto:
      break;
  }
  return faster_engine(file, buffers, depth);
}

}  // namespace

struct Device::Inside {
  Inside(const std::string& path, const DeviceOptions& options)
      : depth(std::max(1U, options.queue_depth)),
        file(path, options.direct),
        buffers(depth, kLongestRequest),
        engine(make_engine(file, buffers, depth, options.engine)),
        way(options.path) {}

  void read(std::span<Transfer> pages, const Limits& limits) {
    way.decide(file, buffers, depth, *engine, limits);
    move(Direction::Read, pages, limits);
  }

  void write(std::span<Transfer> pages, const Limits& limits) {
    move(Direction::Write, pages, limits);
    uint64_t bytes = 0;
    for (const Transfer& page : pages) bytes += page.bytes;
    way.wrote(bytes);
  }

  void move(Direction direction, std::span<Transfer> pages, const Limits& limits) {
    Batch batch(file, buffers, direction, pages, limits, {depth, way.through_buffers()});
    engine->run(batch);
    batch.conclude();
  }

  const unsigned depth;
  SlotFile file;
  BufferPool buffers;
  const std::unique_ptr<Engine> engine;
  Path way;
};

Device::Device(const std::string& path, const DeviceOptions& options)
    : inside_(std::make_unique<Inside>(path, options)) {}

Device::~Device() = default;

void Device::read(std::span<Transfer> pages, const Limits& limits) { inside_->read(pages, limits); }

void Device::write(std::span<Transfer> pages, const Limits& limits) {
  inside_->write(pages, limits);
}

int Device::flush() {
  if (const int error = step(Step::Flush, 0, 0)) return error;
  return inside_->file.flush();
}

bool Device::direct() const { return inside_->file.direct(); }
std::string Device::why_not_direct() const { return inside_->file.why_not_direct(); }
bool Device::through_buffers() const { return inside_->way.through_buffers(); }
const char* Device::engine() const { return inside_->engine->name(); }
uint64_t Device::bytes() const { return inside_->file.bytes(); }

}  // namespace lmcache
