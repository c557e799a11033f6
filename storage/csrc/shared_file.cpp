#include "shared_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "failure.hpp"

namespace lmcache {

namespace {

constexpr uint64_t kMappedAtOnce = 64 << 20;  // so that no other thread's mmap waits for long

// An allocation that fails on tmpfs has first taken all that there was, from everybody.
int allocate(int file, uint64_t bytes) {
  struct statvfs medium;
  if (fstatvfs(file, &medium) == 0 && medium.f_bavail * medium.f_frsize < bytes) return ENOSPC;
  int error;
  do error = posix_fallocate(file, 0, static_cast<off_t>(bytes));
  while (error == EINTR);
  return error;
}

Failure failure_of(const std::string& path, int error) {
  const bool room = error == ENOSPC || error == EDQUOT || error == EFBIG || error == ENOMEM;
  return {room ? Reason::Full : Reason::Io, path + ": " + std::strerror(error)};
}

}  // namespace

SharedFile::~SharedFile() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

void SharedFile::swap(SharedFile& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  std::swap(inode_, other.inode_);
}

// Leaves errno when it cannot.
void SharedFile::map(int file, uint64_t bytes, int protection) {
  struct stat status;
  if (fstat(file, &status) != 0) return;
  void* data = mmap(nullptr, bytes, protection, MAP_SHARED, file, 0);
  if (data == MAP_FAILED) return;
  data_ = static_cast<uint8_t*>(data);
  bytes_ = bytes;
  device_ = status.st_dev;
  inode_ = status.st_ino;
}

SharedFile SharedFile::create(const std::string& path, uint64_t bytes) {
  unlink(path.c_str());
  const int file = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) throw failure_of(path, errno);
  SharedFile made;
  int error = allocate(file, bytes);
  if (error == 0) {
    made.map(file, bytes, PROT_READ | PROT_WRITE);
    if (made.data_ == nullptr) error = errno;
  }
  close(file);
  if (error == 0) return made;
  unlink(path.c_str());
  throw failure_of(path, error);
}

SharedFile SharedFile::open(const std::string& path, int& error, Use use) {
  SharedFile opened;
  const bool writes = use == Use::Write;
  const int flags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | (writes ? O_RDWR : O_RDONLY);
  const int file = ::open(path.c_str(), flags);
  error = file < 0 ? errno : 0;
  if (file < 0) return opened;
  struct stat status;
  if (fstat(file, &status) != 0) {
    error = errno;
  } else if (!S_ISREG(status.st_mode) || status.st_uid != geteuid() || status.st_size == 0) {
    error = EACCES;
  } else {
    opened.map(file, static_cast<uint64_t>(status.st_size), PROT_READ | (writes ? PROT_WRITE : 0));
    if (opened.data_ == nullptr) error = errno;
  }
  close(file);
  return opened;
}

bool SharedFile::is_at(const std::string& path) const {
  struct stat status;
  return stat(path.c_str(), &status) == 0 && status.st_dev == device_ && status.st_ino == inode_;
}

void SharedFile::map_ahead() const {
#ifdef MADV_POPULATE_READ
  for (uint64_t at = 0; at < bytes_; at += kMappedAtOnce)
    if (madvise(data_ + at, std::min(kMappedAtOnce, bytes_ - at), MADV_POPULATE_READ) != 0) return;
#endif
}

}  // namespace lmcache
