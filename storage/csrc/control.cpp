#include "control.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <system_error>

namespace lmcache {

namespace {

constexpr char kMagic[8] = {'l', 'm', 'c', 'c', 't', 'r', 'l', '\0'};

// Offsets of the parts of the file.
constexpr uint64_t kOwnersAt = 4096;
const uint64_t kSpacesAt = kOwnersAt + whole_blocks(kOwners * sizeof(Owner));
const uint64_t kGhostsAt = kSpacesAt + whole_blocks(kSpaces * sizeof(Space));

uint64_t slabs_at(const Shape& shape) {
  return kGhostsAt + whole_blocks(shape.ghosts * sizeof(Ghost));
}
uint64_t slots_at(const Shape& shape) {
  return slabs_at(shape) + whole_blocks(shape.slabs * sizeof(Slab));
}

void read_boot_id(uint8_t (&id)[16]) {
  std::memset(id, 0, sizeof id);
  if (std::FILE* file = std::fopen("/proc/sys/kernel/random/boot_id", "r")) {
    char text[64] = {};
    if (std::fgets(text, sizeof text, file) != nullptr)
      for (size_t i = 0; text[i] != '\0'; ++i)
        id[i % 16] = static_cast<uint8_t>(id[i % 16] * 31 + text[i]);
    std::fclose(file);
  }
}

void make_mutex(pthread_mutex_t* mutex) {
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
  pthread_mutex_init(mutex, &attributes);
  pthread_mutexattr_destroy(&attributes);
}

timespec timespec_of(std::chrono::nanoseconds since) {
  const auto count = std::max<int64_t>(0, since.count());
  return {static_cast<time_t>(count / 1'000'000'000), static_cast<long>(count % 1'000'000'000)};
}

int lock_until(pthread_mutex_t* mutex, Deadline deadline) {
#ifdef __SANITIZE_THREAD__  // which, in GCC 12, does not know the other function
  const auto until = std::chrono::system_clock::now() + (deadline - Clock::now());
  const timespec realtime = timespec_of(until.time_since_epoch());
  return pthread_mutex_timedlock(mutex, &realtime);
#else
  const timespec until = timespec_of(deadline.time_since_epoch());
  return pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until);
#endif
}

template <class T>
T& checked(T* table, uint32_t number, uint64_t count, const char* what) {
  if (number >= count) throw ControlDamaged(std::string("no such ") + what);
  return table[number];
}

}  // namespace

uint64_t Shape::control_bytes() const {
  return slots_at(*this) + whole_blocks(uint64_t{slabs} * slots_per_slab * sizeof(Slot));
}

Control::Control(const std::string& path, const Shape& shape) : shape_(shape) {
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) throw std::system_error(errno, std::generic_category(), path);
  struct stat status;
  const bool whole =
      fstat(file, &status) == 0 && static_cast<uint64_t>(status.st_size) >= shape.control_bytes();
  void* base = MAP_FAILED;
  if (whole)
    base = mmap(nullptr, shape.control_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  const int error = whole ? errno : EINVAL;
  close(file);
  if (base == MAP_FAILED) throw std::system_error(error, std::generic_category(), path);
  base_ = static_cast<uint8_t*>(base);
  header_ = reinterpret_cast<Header*>(base_);
  owners_ = reinterpret_cast<Owner*>(base_ + kOwnersAt);
  spaces_ = reinterpret_cast<Space*>(base_ + kSpacesAt);
  ghosts_ = reinterpret_cast<Ghost*>(base_ + kGhostsAt);
  slabs_ = reinterpret_cast<Slab*>(base_ + slabs_at(shape));
  slots_ = reinterpret_cast<Slot*>(base_ + slots_at(shape));
}

Control::~Control() { munmap(base_, shape_.control_bytes()); }

bool Control::usable(const uint8_t (&store)[16]) const {
  uint8_t boot[16];
  read_boot_id(boot);
  const Shape made{header_->slab_bytes, header_->slabs, header_->slots_per_slab, shape_.ghosts};
  return std::memcmp(header_->magic, kMagic, sizeof kMagic) == 0 &&
         header_->version == kControlVersion &&
         std::memcmp(header_->boot, boot, sizeof boot) == 0 &&
         std::memcmp(header_->store, store, sizeof store) == 0 && made == shape_ &&
         header_->ready.load() != kMaking;
}

void Control::format(const uint8_t (&store)[16], uint32_t policy) {
  std::memset(base_, 0, slots_at(shape_));
  // Of the slots only those that were ever used are touched: the file may be far larger than that.
  make_mutex(&header_->mutex);
  std::memcpy(header_->magic, kMagic, sizeof kMagic);
  header_->version = kControlVersion;
  header_->policy = policy;
  std::memcpy(header_->store, store, sizeof store);
  read_boot_id(header_->boot);
  header_->slab_bytes = shape_.slab_bytes;
  header_->slabs = shape_.slabs;
  header_->slots_per_slab = shape_.slots_per_slab;
  header_->clock = 1;
  for (uint32_t number = 0; number < shape_.slabs; ++number) slabs_[number] = {kNone, 0};
  clear_counts();
}

void Control::clear_class(uint32_t number, uint32_t slabs) {
  Class& its = kind(number);
  const List empty{kNone, kNone, 0};
  its = {slabs == 0 ? 0 : its.slot_blocks,
         slabs == 0 ? 0 : its.slots,
         slabs,
         empty,
         empty,
         empty,
         kNone,
         {}};
}

void Control::clear_counts() {
  for (uint32_t i = 0; i < kOwners; ++i) owners_[i].held = 0;
  header_->pages = header_->bytes = header_->reserved = header_->reserved_bytes = 0;
  header_->dirty_bytes = header_->spilling_bytes = 0;
  header_->forgotten = 0;
  header_->asked = 0;
  header_->dirty = {kNone, kNone, 0};
}

Space& Control::space(uint32_t number) { return checked(spaces_, number, kSpaces, "namespace"); }
Owner& Control::owner(uint32_t number) { return checked(owners_, number, kOwners, "owner"); }
Slab& Control::slab(uint32_t number) { return checked(slabs_, number, shape_.slabs, "slab"); }
Class& Control::kind(uint32_t number) {
  return checked(header_->classes, number, kClasses, "class");
}
Slot& Control::slot(uint32_t number) {
  return checked(slots_, number, uint64_t{shape_.slabs} * shape_.slots_per_slab, "slot");
}

void Control::reset_slots(uint32_t slab, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) reset_slot(slab * shape_.slots_per_slab + i);
}

void Control::reset_slot(uint32_t number) {
  Slot& it = slot(number);
  it.state = State::Free;
  it.queue = Queue::None;
  it.owner = 0;
  it.children = 0;
  it.pinned_until = 0;
  it.flags = 0;
}

uint64_t Control::offset_of(uint32_t slot) {
  return uint64_t{slab_of(slot)} * shape_.slab_bytes +
         uint64_t{slot % shape_.slots_per_slab} * slot_bytes(slot);
}

uint32_t Control::slot_at(uint64_t offset) {
  const uint64_t number = offset / shape_.slab_bytes;
  if (number >= shape_.slabs || slabs_[number].kind >= kClasses) return kNone;
  const Class& its = kind(slabs_[number].kind);
  const uint64_t within = offset % shape_.slab_bytes, bytes = its.slot_blocks * kBlock;
  if (bytes == 0 || within % bytes != 0 || within / bytes >= its.slots) return kNone;
  return static_cast<uint32_t>(number * shape_.slots_per_slab + within / bytes);
}

bool Control::is_of_its_slab(uint32_t number) {
  const uint32_t kind = slab(slab_of(number)).kind;
  return kind < kClasses && number % shape_.slots_per_slab < header_->classes[kind].slots;
}

Key Control::key_of(uint32_t number) {
  const Slot& at = slot(number);
  const Space& its = space(at.space);
  return Key::of({reinterpret_cast<const char*>(its.name), kNamespaceBytes},
                 {reinterpret_cast<const char*>(at.hash), kHashBytes});
}

uint32_t Control::find_space(std::string_view name) {
  for (uint32_t i = 0; i < kSpaces; ++i) {
    const Space& it = spaces_[i];
    if ((it.pages != 0 || it.quota != 0) && std::memcmp(it.name, name.data(), kNamespaceBytes) == 0)
      return i;
  }
  return kNone;
}

uint32_t Control::intern_space(std::string_view name) {
  const uint32_t known = find_space(name);
  if (known != kNone) return known;
  for (uint32_t i = 0; i < kSpaces; ++i) {
    if (spaces_[i].pages != 0 || spaces_[i].quota != 0) continue;
    std::memcpy(spaces_[i].name, name.data(), kNamespaceBytes);
    return i;
  }
  return kNone;
}

void Control::push_newest(List& list, uint32_t number, Queue queue) {
  Slot& it = slot(number);
  it.queue = queue;
  it.next = list.newest;  // towards older
  it.prev = kNone;        // towards newer
  if (list.newest != kNone) slot(list.newest).prev = number;
  list.newest = number;
  if (list.oldest == kNone) list.oldest = number;
  ++list.count;
}

void Control::push_oldest(List& list, uint32_t number, Queue queue) {
  Slot& it = slot(number);
  it.queue = queue;
  it.prev = list.oldest;
  it.next = kNone;
  if (list.oldest != kNone) slot(list.oldest).next = number;
  list.oldest = number;
  if (list.newest == kNone) list.newest = number;
  ++list.count;
}

void Control::push_older(List& list, uint32_t than, uint32_t number, Queue queue) {
  if (slot(than).next == kNone) return push_oldest(list, number, queue);
  Slot& it = slot(number);
  it.queue = queue;
  it.prev = than;
  it.next = slot(than).next;
  slot(it.next).prev = number;
  slot(than).next = number;
  ++list.count;
}

void Control::unlink(List& list, uint32_t number) {
  Slot& it = slot(number);
  if (it.prev != kNone)
    slot(it.prev).next = it.next;
  else
    list.newest = it.next;
  if (it.next != kNone)
    slot(it.next).prev = it.prev;
  else
    list.oldest = it.prev;
  it.prev = it.next = kNone;
  it.queue = Queue::None;
  if (list.count-- == 0) throw ControlDamaged("a list holds more than it counts");
}

Lock::Lock(Control& control, Deadline deadline) : mutex_(&control.header().mutex) {
  const int code = lock_until(mutex_, deadline);
  if (code == ETIMEDOUT)
    throw Failure(Reason::Busy, "another process did not finish its change of the store in time");
  if (code == EOWNERDEAD) {
    control.header().ready = kBroken;
    pthread_mutex_consistent(mutex_);
  } else if (code != 0) {
    throw Failure(Reason::Closed, std::string("the store's lock: ") + std::strerror(code));
  }
}

Lock::~Lock() { pthread_mutex_unlock(mutex_); }

bool wait_while(std::atomic<uint32_t>& word, uint32_t seen, Deadline deadline) {
  while (word.load() == seen) {
    const auto left = deadline - Clock::now();
    if (left <= left.zero()) return false;
    const timespec timeout = timespec_of(left);
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &timeout, nullptr, 0);
  }
  return true;
}

void advance(std::atomic<uint32_t>& word) {
  word.fetch_add(1);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace lmcache
