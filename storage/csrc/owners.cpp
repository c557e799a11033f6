#include "owners.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "control.hpp"

namespace lmcache {

namespace {

struct flock byte_lock(short type, uint16_t owner) {
  struct flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = owner;
  lock.l_len = 1;
  return lock;
}

}  // namespace

Owners::Owners(const std::string& path)
    : file_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)) {
  if (file_ < 0) throw std::system_error(errno, std::generic_category(), path);
  for (uint16_t number = 1; number < kOwners; ++number) {
    struct flock lock = byte_lock(F_WRLCK, number);
    if (fcntl(file_, F_OFD_SETLK, &lock) != 0) continue;
    self_ = number;
    return;
  }
  close(file_);
  throw Failure(Reason::Full, std::to_string(kOwners - 1) +
                                  " processes have the store open, and no more can; give some of "
                                  "them a store of their own");
}

Owners::~Owners() { close(file_); }

bool Owners::alive(uint16_t owner) const {
  if (owner == self_) return true;
  struct flock lock = byte_lock(F_WRLCK, owner);
  return fcntl(file_, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

}  // namespace lmcache
