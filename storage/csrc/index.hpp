// The index of a store: one LMDB file. What is committed here is what the store has.
//
// A write transaction is begun only by who holds the store's shared mutex (control.hpp), so LMDB's
// own writer lock, which knows no deadline, is never waited for.
#pragma once

#include <lmdb.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <string>
#include <vector>

#include "entry.hpp"
#include "failure.hpp"

namespace lmcache {

// Entries changed in one transaction, at most; slab/plan.py gives the file room for so many.
inline constexpr size_t kIndexBatch = 1024;

enum class Sync {
  Durable,   // a commit is on the medium when it returns
  Ordered,   // the last commits may be lost by a power cut, the file never breaks
  Volatile,  // memory: nothing to sync
};

struct IndexOptions {
  std::string path;
  uint64_t map_bytes;
  Sync sync = Sync::Durable;
  bool create = false;  // for the process that has the store alone
};

// Outcome of looking one key up.
struct Found {
  enum class Kind : uint8_t { Absent, Present, Damaged } kind = Kind::Absent;
  Entry entry{};
};

// LMDB has no page left. It uses none again that a snapshot may still see.
class IndexFull : public Failure {
 public:
  using Failure::Failure;
};

class Index {
 public:
  class Read;
  class Write;
  using Visit = std::function<void(const Key&, const Found&)>;

  // How the index names an absent parent.
  static std::string tagged(std::string_view space, Tag tag);

  explicit Index(const IndexOptions& options);
  ~Index();
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;

  unsigned reap_readers();  // of processes that were killed; they would make the file grow
  bool has_old_reader();    // whether a snapshot of more than one commit ago is in use
  uint64_t last_change();   // the number of the last commit, of whichever process
  uint64_t used_bytes();    // pages of the file that ever held something
  uint64_t tree_bytes();    // pages of the index table's tree
  uint64_t map_bytes() const { return options_.map_bytes; }
  void copy_compact(const std::string& path);  // a smaller copy of the file

 private:
  friend class Read;
  friend class Write;
  using User = std::shared_lock<std::shared_mutex>;

  void open(bool create);
  void open_tables(bool create);
  void shut();
  User use();
  void answer(int code, const char* doing);  // throws Failure
  MDB_txn* borrow();
  void give_back(MDB_txn* txn);

  // LMDB gives an environment up when it cannot write its first pages; it is opened anew then, as
  // soon as nobody in this process uses it.
  IndexOptions options_;
  std::shared_mutex users_;
  std::atomic<bool> given_up_{false};
  MDB_env* env_ = nullptr;
  MDB_dbi index_ = 0, meta_ = 0, orphans_ = 0, pins_ = 0, quotas_ = 0;
  std::mutex idle_lock_;
  std::vector<MDB_txn*> idle_;  // read transactions, reset
};

// A snapshot. Hold it for lookups only: pages that a long one still sees cannot be used again.
class Index::Read {
 public:
  explicit Read(Index& index) : index_(index), user_(index.use()), txn_(index.borrow()) {}
  ~Read() { index_.give_back(txn_); }
  Read(const Read&) = delete;
  Read& operator=(const Read&) = delete;

  Found find(const Key& key) const;
  // The page whose hash begins with the tag.
  std::optional<std::pair<Key, Entry>> find_tag(std::string_view space, Tag tag) const;
  // Every page from `from` on, in the order of the keys, until `visit` has seen `most` of them; the
  // number seen.
  size_t walk(const Key* after, size_t most, const Visit& visit) const;
  void walk_orphans(const std::function<void(std::string_view parent, uint32_t)>& visit) const;
  void walk_pins(const std::function<void(const Key&, uint32_t until)>& visit) const;
  void walk_quotas(const std::function<void(std::string_view space, uint64_t bytes)>& visit) const;
  std::string meta(const std::string& name) const;  // empty: not there

 private:
  Index& index_;
  const User user_;
  MDB_txn* txn_;
};

// Changes that take effect together, at `commit`; without it, none does.
class Index::Write {
 public:
  explicit Write(Index& index);
  ~Write();
  Write(const Write&) = delete;
  Write& operator=(const Write&) = delete;

  Found find(const Key& key) const;
  std::optional<std::pair<Key, Entry>> find_tag(std::string_view space, Tag tag) const;
  void put(const Key& key, const Entry& entry);
  bool erase(const Key& key);
  // Pages of the namespace, at most `most`, in the order of their keys.
  std::vector<std::pair<Key, Found>> in_space(std::string_view space, size_t most) const;

  // How many pages name an absent page as their parent.
  uint32_t orphans(std::string_view space, Tag parent) const;
  void set_orphans(std::string_view space, Tag parent, uint32_t count);
  void set_orphans(const std::string& tagged, uint32_t count);
  void set_pin(const Key& key, uint32_t until);            // 0: none
  void set_quota(std::string_view space, uint64_t bytes);  // 0: none
  void set_meta(const std::string& name, std::string_view value);

  void commit();

 private:
  Index& index_;
  const User user_;
  MDB_txn* txn_ = nullptr;
};

}  // namespace lmcache
