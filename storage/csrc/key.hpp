// A page's key: 16 bytes of namespace digest, 32 bytes of page hash.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace lmcache {

inline constexpr size_t kNamespaceBytes = 16;
inline constexpr size_t kHashBytes = 32;
inline constexpr size_t kKeyBytes = kNamespaceBytes + kHashBytes;
inline constexpr size_t kTagBytes = 8;

// The first bytes of a page's hash: how a page names its parent, within its own namespace. 0: none.
using Tag = uint64_t;

struct Key {
  std::array<uint8_t, kKeyBytes> bytes;

  std::string_view view() const { return {reinterpret_cast<const char*>(bytes.data()), kKeyBytes}; }
  std::string_view space() const { return view().substr(0, kNamespaceBytes); }
  std::string_view hash() const { return view().substr(kNamespaceBytes); }
  Tag tag() const {
    Tag tag;
    std::memcpy(&tag, bytes.data() + kNamespaceBytes, sizeof tag);
    return tag;
  }
  bool operator==(const Key&) const = default;

  static Key of(std::string_view text) {
    Key key;
    std::memcpy(key.bytes.data(), text.data(), kKeyBytes);
    return key;
  }
  static Key of(std::string_view space, std::string_view hash) {
    Key key;
    std::memcpy(key.bytes.data(), space.data(), kNamespaceBytes);
    std::memcpy(key.bytes.data() + kNamespaceBytes, hash.data(), kHashBytes);
    return key;
  }
};

struct KeyHash {
  size_t operator()(const Key& key) const { return key.tag(); }  // the hash's bytes are random
};

}  // namespace lmcache
