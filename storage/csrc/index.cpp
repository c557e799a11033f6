#include "index.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "steps.hpp"

namespace lmcache {

namespace {

constexpr unsigned kMaxReaders = 1024;  // LMDB's default of 126 is short for many ranks and threads
constexpr unsigned kTables = 5;
constexpr size_t kIdleMost = 32;

Reason reason_of(int code) {
  switch (code) {
    case MDB_MAP_FULL:
    case MDB_TXN_FULL:
    case MDB_READERS_FULL:
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case ENOMEM:
      return Reason::Full;
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_INVALID:
    case MDB_CURSOR_FULL:
    case MDB_VERSION_MISMATCH:
    case MDB_INCOMPATIBLE:
      return Reason::Corrupt;
    default:
      return Reason::Io;
  }
}

void require(int code, const char* doing) {
  if (code == 0) return;
  const std::string detail = std::string("index: ") + doing + ": " + mdb_strerror(code);
  if (code == MDB_MAP_FULL) throw IndexFull(Reason::Full, detail);
  throw Failure(reason_of(code), detail);
}

MDB_val value_of(std::string_view text) { return {text.size(), const_cast<char*>(text.data())}; }

std::string_view text_of(const MDB_val& value) {
  return {static_cast<const char*>(value.mv_data), value.mv_size};
}

template <class T>
T number_of(const MDB_val& value) {
  T number = 0;
  std::memcpy(&number, value.mv_data, std::min(sizeof number, value.mv_size));
  return number;
}

class Cursor {
 public:
  Cursor(MDB_txn* txn, MDB_dbi table) { require(mdb_cursor_open(txn, table, &cursor_), "cursor"); }
  ~Cursor() { mdb_cursor_close(cursor_); }
  Cursor(const Cursor&) = delete;
  Cursor& operator=(const Cursor&) = delete;
  bool move(MDB_cursor_op op) {
    const int code = mdb_cursor_get(cursor_, &key, &data, op);
    if (code != MDB_NOTFOUND) require(code, "walk");
    return code == 0;
  }
  MDB_val key{}, data{};

 private:
  MDB_cursor* cursor_ = nullptr;
};

Found found_of(const Key& key, const MDB_val& data) {
  const auto entry = unseal(key, data.mv_data, data.mv_size);
  return entry ? Found{Found::Kind::Present, *entry} : Found{Found::Kind::Damaged, {}};
}

Found find_in(MDB_txn* txn, MDB_dbi table, const Key& key) {
  MDB_val wanted = value_of(key.view()), data;
  const int code = mdb_get(txn, table, &wanted, &data);
  if (code == MDB_NOTFOUND) return {};
  require(code, "lookup");
  return found_of(key, data);
}

void put_or_erase(MDB_txn* txn, MDB_dbi table, std::string_view key, std::string_view data,
                  bool keep) {
  MDB_val k = value_of(key), d = value_of(data);
  const int code = keep ? mdb_put(txn, table, &k, &d, 0) : mdb_del(txn, table, &k, nullptr);
  if (code != MDB_NOTFOUND) require(code, "change");
}

template <class T>
std::string_view bytes_of(const T& number) {
  return {reinterpret_cast<const char*>(&number), sizeof number};
}

unsigned flags_of(Sync sync) {
  const unsigned always = MDB_NOSUBDIR | MDB_NOTLS | MDB_NORDAHEAD;
  switch (sync) {
    case Sync::Durable:
      return always;
    case Sync::Ordered:
      return always | MDB_NOMETASYNC;
    case Sync::Volatile:
      return always | MDB_NOSYNC;
  }
  return always;
}

std::optional<std::pair<Key, Entry>> find_tag_in(MDB_txn* txn, MDB_dbi table,
                                                 std::string_view space, Tag tag) {
  const std::string prefix = Index::tagged(space, tag);
  Cursor cursor(txn, table);
  cursor.key = value_of(prefix);
  if (!cursor.move(MDB_SET_RANGE) || cursor.key.mv_size != kKeyBytes) return std::nullopt;
  if (!text_of(cursor.key).starts_with(prefix)) return std::nullopt;
  const Key key = Key::of(text_of(cursor.key));
  const Found found = found_of(key, cursor.data);
  if (found.kind != Found::Kind::Present) return std::nullopt;
  return std::pair{key, found.entry};
}

}  // namespace

std::string Index::tagged(std::string_view space, Tag tag) {
  std::string text(space);
  text.append(reinterpret_cast<const char*>(&tag), sizeof tag);
  return text;
}

Index::Index(const IndexOptions& options) : options_(options) { open(options.create); }

void Index::open(bool create) {
  require(mdb_env_create(&env_), "create");
  try {
    require(mdb_env_set_mapsize(env_, options_.map_bytes), "map size");
    require(mdb_env_set_maxdbs(env_, kTables), "tables");
    require(mdb_env_set_maxreaders(env_, kMaxReaders), "readers");
    require(mdb_env_open(env_, options_.path.c_str(), flags_of(options_.sync), 0600), "open");
    int dead = 0;
    require(mdb_reader_check(env_, &dead), "readers");
    open_tables(create);
  } catch (...) {
    mdb_env_close(env_);
    env_ = nullptr;
    throw;
  }
}

void Index::shut() {
  for (MDB_txn* txn : idle_) mdb_txn_abort(txn);
  idle_.clear();
  if (env_ != nullptr) mdb_env_close(env_);
  env_ = nullptr;
}

// Keeps the environment open for as long as it is held. Where a transaction of this thread is under
// way nothing is opened anew, nor waited for: the next call may.
Index::User Index::use() {
  if (given_up_.load(std::memory_order_relaxed)) {
    const std::unique_lock alone(users_, std::try_to_lock);
    if (alone && given_up_) {
      shut();
      open(false);
      given_up_ = false;
    }
  }
  User user(users_);
  if (env_ == nullptr) throw Failure(Reason::Io, "index: it could not be opened anew");
  return user;
}

void Index::answer(int code, const char* doing) {
  if (code == MDB_PANIC) given_up_ = true;
  require(code, doing);
}

// Only who makes the store writes here: another process's transaction could keep us waiting.
void Index::open_tables(bool create) {
  MDB_txn* txn = nullptr;
  require(mdb_txn_begin(env_, nullptr, create ? 0 : MDB_RDONLY, &txn), "begin");
  const std::pair<const char*, MDB_dbi*> tables[] = {{"meta", &meta_},
                                                     {"index", &index_},
                                                     {"orphans", &orphans_},
                                                     {"pins", &pins_},
                                                     {"quotas", &quotas_}};
  for (const auto& [name, handle] : tables) {
    const int code = mdb_dbi_open(txn, name, create ? MDB_CREATE : 0, handle);
    if (code == 0) continue;
    mdb_txn_abort(txn);
    require(code, name);
  }
  require(mdb_txn_commit(txn), "commit");
}

Index::~Index() { shut(); }

unsigned Index::reap_readers() {
  const User user = use();
  int dead = 0;
  require(mdb_reader_check(env_, &dead), "readers");
  return static_cast<unsigned>(dead);
}

// LMDB tells of its readers in text: a line "pid thread snapshot" for each, with a dash when it has
// none.
bool Index::has_old_reader() {
  const User user = use();
  MDB_envinfo info;
  require(mdb_env_info(env_, &info), "info");
  uint64_t oldest = info.me_last_txnid;
  const auto look = [](const char* line, void* found) {
    auto& oldest = *static_cast<uint64_t*>(found);
    const size_t last = std::string_view(line).find_last_of(' ');
    const uint64_t snapshot = std::strtoull(line + last + 1, nullptr, 10);
    if (snapshot != 0) oldest = std::min(oldest, snapshot);
    return 0;
  };
  if (const int code = mdb_reader_list(env_, look, &oldest); code < 0) require(code, "readers");
  return oldest + 1 < info.me_last_txnid;
}

uint64_t Index::last_change() {
  const User user = use();
  MDB_envinfo info;
  require(mdb_env_info(env_, &info), "info");
  return info.me_last_txnid;
}

uint64_t Index::used_bytes() {
  const User user = use();
  MDB_envinfo info;
  MDB_stat stat;
  require(mdb_env_info(env_, &info), "info");
  require(mdb_env_stat(env_, &stat), "stat");
  return (info.me_last_pgno + 1) * stat.ms_psize;
}

uint64_t Index::tree_bytes() {
  const User user = use();
  MDB_txn* txn = borrow();
  MDB_stat stat{};
  const int code = mdb_stat(txn, index_, &stat);
  give_back(txn);
  require(code, "stat");
  return (stat.ms_branch_pages + stat.ms_leaf_pages + stat.ms_overflow_pages) * stat.ms_psize;
}

void Index::copy_compact(const std::string& path) {
  const User user = use();
  require(mdb_env_copy2(env_, path.c_str(), MDB_CP_COMPACT), "copy");
}

MDB_txn* Index::borrow() {
  MDB_txn* txn = nullptr;
  {
    const std::lock_guard guard(idle_lock_);
    if (!idle_.empty()) {
      txn = idle_.back();
      idle_.pop_back();
    }
  }
  if (txn == nullptr) {
    answer(mdb_txn_begin(env_, nullptr, MDB_RDONLY, &txn), "read");
    return txn;
  }
  if (const int code = mdb_txn_renew(txn); code != 0) {
    mdb_txn_abort(txn);
    answer(code, "read");
  }
  return txn;
}

void Index::give_back(MDB_txn* txn) {
  mdb_txn_reset(txn);
  {
    const std::lock_guard guard(idle_lock_);
    if (idle_.size() < kIdleMost) {
      idle_.push_back(txn);
      return;
    }
  }
  mdb_txn_abort(txn);
}

Found Index::Read::find(const Key& key) const { return find_in(txn_, index_.index_, key); }

std::optional<std::pair<Key, Entry>> Index::Read::find_tag(std::string_view space, Tag tag) const {
  return find_tag_in(txn_, index_.index_, space, tag);
}

size_t Index::Read::walk(const Key* after, size_t most, const Visit& visit) const {
  Cursor cursor(txn_, index_.index_);
  bool there;
  if (after == nullptr) {
    there = cursor.move(MDB_FIRST);
  } else {
    cursor.key = value_of(after->view());
    there = cursor.move(MDB_SET_RANGE);
    if (there && text_of(cursor.key) == after->view()) there = cursor.move(MDB_NEXT);
  }
  size_t seen = 0;
  for (; there && seen < most; there = cursor.move(MDB_NEXT), ++seen) {
    if (cursor.key.mv_size != kKeyBytes) continue;
    const Key key = Key::of(text_of(cursor.key));
    visit(key, found_of(key, cursor.data));
  }
  return seen;
}

void Index::Read::walk_orphans(const std::function<void(std::string_view, uint32_t)>& visit) const {
  Cursor cursor(txn_, index_.orphans_);
  for (bool there = cursor.move(MDB_FIRST); there; there = cursor.move(MDB_NEXT))
    visit(text_of(cursor.key), number_of<uint32_t>(cursor.data));
}

void Index::Read::walk_pins(const std::function<void(const Key&, uint32_t)>& visit) const {
  Cursor cursor(txn_, index_.pins_);
  for (bool there = cursor.move(MDB_FIRST); there; there = cursor.move(MDB_NEXT))
    if (cursor.key.mv_size == kKeyBytes)
      visit(Key::of(text_of(cursor.key)), number_of<uint32_t>(cursor.data));
}

void Index::Read::walk_quotas(const std::function<void(std::string_view, uint64_t)>& visit) const {
  Cursor cursor(txn_, index_.quotas_);
  for (bool there = cursor.move(MDB_FIRST); there; there = cursor.move(MDB_NEXT))
    if (cursor.key.mv_size == kNamespaceBytes)
      visit(text_of(cursor.key), number_of<uint64_t>(cursor.data));
}

std::string Index::Read::meta(const std::string& name) const {
  MDB_val key = value_of(name), data;
  const int code = mdb_get(txn_, index_.meta_, &key, &data);
  if (code == MDB_NOTFOUND) return {};
  require(code, "meta");
  return std::string(text_of(data));
}

Index::Write::Write(Index& index) : index_(index), user_(index.use()) {
  if (const int error = step(Step::IndexBegin, 0, 0)) index.answer(error, "begin");
  index.answer(mdb_txn_begin(index.env_, nullptr, 0, &txn_), "begin");
}

Index::Write::~Write() {
  if (txn_ != nullptr) mdb_txn_abort(txn_);
}

Found Index::Write::find(const Key& key) const { return find_in(txn_, index_.index_, key); }

std::optional<std::pair<Key, Entry>> Index::Write::find_tag(std::string_view space, Tag tag) const {
  return find_tag_in(txn_, index_.index_, space, tag);
}

void Index::Write::put(const Key& key, const Entry& entry) {
  Entry sealed = entry;
  seal(key, sealed);
  put_or_erase(txn_, index_.index_, key.view(), bytes_of(sealed), true);
}

bool Index::Write::erase(const Key& key) {
  MDB_val k = value_of(key.view());
  const int code = mdb_del(txn_, index_.index_, &k, nullptr);
  if (code != MDB_NOTFOUND) require(code, "erase");
  return code == 0;
}

std::vector<std::pair<Key, Found>> Index::Write::in_space(std::string_view space,
                                                          size_t most) const {
  std::vector<std::pair<Key, Found>> pages;
  Cursor cursor(txn_, index_.index_);
  cursor.key = value_of(space);
  bool there = cursor.move(MDB_SET_RANGE);
  for (; there && pages.size() < most; there = cursor.move(MDB_NEXT)) {
    if (cursor.key.mv_size != kKeyBytes || !text_of(cursor.key).starts_with(space)) break;
    const Key key = Key::of(text_of(cursor.key));
    pages.emplace_back(key, found_of(key, cursor.data));
  }
  return pages;
}

uint32_t Index::Write::orphans(std::string_view space, Tag parent) const {
  const std::string name = tagged(space, parent);
  MDB_val key = value_of(name), data;
  const int code = mdb_get(txn_, index_.orphans_, &key, &data);
  if (code == MDB_NOTFOUND) return 0;
  require(code, "orphans");
  return number_of<uint32_t>(data);
}

void Index::Write::set_orphans(std::string_view space, Tag parent, uint32_t count) {
  set_orphans(tagged(space, parent), count);
}

void Index::Write::set_orphans(const std::string& tagged, uint32_t count) {
  put_or_erase(txn_, index_.orphans_, tagged, bytes_of(count), count != 0);
}

void Index::Write::set_pin(const Key& key, uint32_t until) {
  put_or_erase(txn_, index_.pins_, key.view(), bytes_of(until), until != 0);
}

void Index::Write::set_quota(std::string_view space, uint64_t bytes) {
  put_or_erase(txn_, index_.quotas_, space, bytes_of(bytes), bytes != 0);
}

void Index::Write::set_meta(const std::string& name, std::string_view value) {
  put_or_erase(txn_, index_.meta_, name, value, true);
}

void Index::Write::commit() {
  if (const int error = step(Step::IndexCommit, 0, 0)) index_.answer(error, "commit");
  MDB_txn* txn = txn_;
  txn_ = nullptr;  // LMDB frees it, whatever becomes of the commit
  index_.answer(mdb_txn_commit(txn), "commit");
  step(Step::IndexCommitted, 0, 0);
}

}  // namespace lmcache
