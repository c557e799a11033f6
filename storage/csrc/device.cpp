#include "device.hpp"

#include <algorithm>

#include "path.hpp"

namespace lmcache {

using namespace io;

struct Device::Inside {
  Inside(const std::string& path, const DeviceOptions& options)
      : depth(std::max(1U, options.queue_depth)),
        file(path, options.direct),
        buffers(depth, kLongestRequest),
        engines(depth, options.engine),
        way(options.path) {
    way.decide(file, buffers, depth, engines, {});  // here, or the first read would wait for it
    const Range range = file.written(Probe::kLeastBytes);
    if (range.begin != range.end)
      engines.decide(file, buffers, depth, range, way.through_buffers());
  }

  void read(std::span<Transfer> pages, const Limits& limits) {
    way.decide(file, buffers, depth, engines, limits);
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
    engines.current().run(batch);
    batch.conclude();
  }

  const unsigned depth;
  SlotFile file;
  BufferPool buffers;
  Engines engines;
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
const char* Device::engine() const { return inside_->engines.current().name(); }
uint64_t Device::bytes() const { return inside_->file.bytes(); }

}  // namespace lmcache
