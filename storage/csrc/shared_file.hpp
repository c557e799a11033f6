// A file of shared memory, mapped whole.
#pragma once

#include <cstdint>
#include <string>

namespace lmcache {

class SharedFile {
 public:
  SharedFile() = default;
  SharedFile(SharedFile&& other) noexcept { swap(other); }
  SharedFile& operator=(SharedFile&& other) noexcept {
    swap(other);
    return *this;
  }
  ~SharedFile();

  // Allocated in full, zeros, mode 0600, in place of whatever had the name: no write to it can fail
  // later. Throws Failure (Full, when there is no room; Io), and then leaves no file.
  static SharedFile create(const std::string& path, uint64_t bytes);
  enum class Use { Read, Write };
  // Of bytes() == 0, with why in `error`, when it cannot be: EACCES also for a file of another
  // user, who could shorten it under us, and for what is no plain file.
  static SharedFile open(const std::string& path, int& error, Use use = Use::Read);

  uint64_t bytes() const { return bytes_; }
  uint8_t* data() const { return data_; }
  // Whether the path still leads to this file.
  bool is_at(const std::string& path) const;
  // Maps what a lookup would else map by faults, page by page. A kernel before 5.14 cannot.
  void map_ahead() const;

 private:
  void swap(SharedFile& other) noexcept;
  void map(int file, uint64_t bytes, int protection);

  uint8_t* data_ = nullptr;
  uint64_t bytes_ = 0;
  uint64_t device_ = 0, inode_ = 0;
};

}  // namespace lmcache
