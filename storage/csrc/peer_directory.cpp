#include "peer_directory.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <string_view>

namespace lmcache {

namespace {

constexpr char kMagic[8] = {'l', 'm', 'c', 'p', 'e', 'e', 'r', '1'};
constexpr uint64_t kLeastLines = (64 << 10) / TagTable::kLineWords;
constexpr size_t kPutAtOnce = 1024;  // tags, between two looks at how full the table is
constexpr int kOpenTries = 8;        // of a table whose generation has passed meanwhile
constexpr auto kRelaxed = std::memory_order_relaxed;

// Words in use, erased ones too, at which the table gets larger; and that it never exceeds.
uint64_t roomy(uint64_t words) { return words / 10 * 7; }
uint64_t cramped(uint64_t words) { return words / 10 * 8; }

uint64_t now_ms() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000 + static_cast<uint64_t>(now.tv_nsec) / 1'000'000;
}

std::string table_name(const std::string& path, uint64_t agent, uint64_t generation) {
  char name[48];
  std::snprintf(name, sizeof name, ".%016" PRIx64 "-%" PRIu64, agent, generation);
  return path + name;
}

// What table_name adds, less its dot.
bool is_table_suffix(std::string_view text) {
  const size_t dash = text.find('-');
  return dash == 16 && dash + 1 < text.size() &&
         text.find_first_not_of("0123456789abcdef") == dash &&
         text.find_first_not_of("0123456789", dash + 1) == text.npos;
}

bool is_head(const SharedFile& file) {
  if (file.bytes() != sizeof(DirectoryHead)) return false;
  return std::memcmp(file.data(), kMagic, sizeof kMagic) == 0;
}

}  // namespace

void PeerRecord::write(const PeerFields& fields) {
  uint64_t words[kWords];
  std::memcpy(words, &fields, sizeof fields);
  const uint64_t next = written_.load(kRelaxed) + 1;
  // Released one by one: who sees a word of this write sees that the one before has ended, too.
  for (size_t i = 0; i < kWords; ++i)
    copies_[next % 2][i].store(words[i], std::memory_order_release);
  written_.store(next, std::memory_order_release);
}

bool PeerRecord::read(PeerFields& fields) const {
  uint64_t words[kWords];
  for (;;) {
    const uint64_t written = written_.load(std::memory_order_acquire);
    if (written == 0) return false;
    const auto& copy = copies_[written % 2];
    for (size_t i = 0; i < kWords; ++i) words[i] = copy[i].load(std::memory_order_acquire);
    // This copy is written again only after the other one has become the whole one.
    if (written_.load(kRelaxed) == written) break;
  }
  std::memcpy(&fields, words, sizeof fields);
  return true;
}

void PeerRecord::write_pulse(PeerPulse pulse) {
  pulse_.store(uint64_t{pulse.rtt_us} << 32 | pulse.load, kRelaxed);
}

PeerPulse PeerRecord::pulse() const {
  const uint64_t pulse = pulse_.load(kRelaxed);
  return {static_cast<uint32_t>(pulse >> 32), static_cast<uint32_t>(pulse)};
}

PeerDirectory::PeerDirectory(const std::string& path, uint64_t bytes_most, uint64_t agent,
                             uint64_t salt)
    : path_(path),
      bytes_most_(bytes_most),
      agent_(agent),
      salt_(salt),
      table_(make_table(generation_, kLeastLines)) {
  try {
    SharedFile made = SharedFile::create(path + ".new", sizeof(DirectoryHead));
    auto& head = *reinterpret_cast<DirectoryHead*>(made.data());
    std::memcpy(head.magic, kMagic, sizeof kMagic);
    head.agent = agent;
    head.generation = generation_;
    head.beat = now_ms();
    replace_head(std::move(made));
  } catch (...) {
    unlink(table_path(generation_).c_str());
    throw;
  }
}

void PeerDirectory::replace_head(SharedFile made) {
  const std::string fresh = path_ + ".new";
  int error;
  const SharedFile old = SharedFile::open(path_, error, SharedFile::Use::Write);
  if (rename(fresh.c_str(), path_.c_str()) != 0) {
    error = errno;
    unlink(fresh.c_str());
    throw Failure(Reason::Io, path_ + ": " + std::strerror(error));
  }
  head_file_ = std::move(made);
  head_ = reinterpret_cast<DirectoryHead*>(head_file_.data());
  if (is_head(old)) reinterpret_cast<DirectoryHead*>(old.data())->closed = 1;
  remove_tables_of_others();
}

// Those of a writer that was killed have no other end.
void PeerDirectory::remove_tables_of_others() const {
  const std::filesystem::path path(path_);
  const std::string prefix = path.filename().string() + ".";
  const std::string own = std::filesystem::path(table_path(generation_)).filename().string();
  std::error_code ignored;
  for (const auto& file : std::filesystem::directory_iterator(path.parent_path(), ignored)) {
    const std::string name = file.path().filename().string();
    if (name.starts_with(prefix) && name != own && is_table_suffix(name.substr(prefix.size())))
      unlink(file.path().c_str());
  }
}

PeerDirectory::~PeerDirectory() { close(); }

void PeerDirectory::close() {
  const std::lock_guard guard(table_lock_);
  if (table_ == nullptr) return;
  head_->closed = 1;
  unlink(table_path(generation_).c_str());
  if (head_file_.is_at(path_)) unlink(path_.c_str());
  table_.reset();
}

std::string PeerDirectory::table_path(uint64_t generation) const {
  return table_name(path_, agent_, generation);
}

std::unique_ptr<TagTable> PeerDirectory::make_table(uint64_t generation, uint64_t lines) const {
  SharedFile file = SharedFile::create(table_path(generation), TagTable::bytes_for(lines));
  return std::make_unique<TagTable>(std::move(file), agent_, generation, salt_, lines);
}

TagTable& PeerDirectory::table() {
  if (table_ == nullptr) throw Failure(Reason::Closed, path_ + ": it was closed");
  return *table_;
}

uint64_t PeerDirectory::put(unsigned peer, std::span<const uint64_t> tags) {
  const std::lock_guard guard(table_lock_);
  uint64_t left_out = 0;
  for (bool growing = true; !tags.empty();) {
    const auto some = tags.first(std::min(tags.size(), kPutAtOnce));
    // Room that could not be made is asked for once a call: an attempt is not free.
    while (growing && is_crowded(some.size())) growing = make_room();
    pages_[peer] += table().put(peer, some, cramped(table().words()), left_out);
    tags = tags.subspan(some.size());
  }
  left_out_ += left_out;
  return left_out;
}

bool PeerDirectory::is_crowded(size_t more) const {
  return table_ != nullptr && table_->live() + table_->erased() + more > roomy(table_->words());
}

// Whether there is more room now. A table may take no more than half of all bytes: it must be
// possible to make it anew beside itself, without what was erased.
bool PeerDirectory::make_room() {
  const uint64_t lines = table_->lines();
  const bool is_littered = table_->erased() >= table_->words() / 8;
  const uint64_t wanted = is_littered ? lines : 2 * lines;
  if (sizeof(DirectoryHead) + 2 * TagTable::bytes_for(wanted) > bytes_most_) return false;
  try {
    rebuild(wanted);
  } catch (const Failure&) {
    return false;  // shared memory is full, and lookups miss what is left out
  }
  return true;
}

void PeerDirectory::rebuild(uint64_t lines) {
  auto made = make_table(generation_ + 1, lines);
  made->copy_from(*table_);
  head_->generation.store(generation_ + 1, std::memory_order_release);
  unlink(table_path(generation_).c_str());
  ++generation_;
  table_ = std::move(made);
}

uint64_t PeerDirectory::drop(unsigned peer, std::span<const uint64_t> tags) {
  const std::lock_guard guard(table_lock_);
  const uint64_t gone = table().erase(peer, tags);
  pages_[peer] -= gone;
  return gone;
}

void PeerDirectory::forget(unsigned peer) {
  doubt(peer);
  const std::lock_guard guard(table_lock_);
  if (pages_[peer] != 0) table().erase_all(peer);
  pages_[peer] = 0;
}

void PeerDirectory::set_record(unsigned peer, const PeerFields& fields, PeerPulse pulse) {
  const std::lock_guard guard(record_lock_);
  set_pulse(peer, pulse);
  if (std::memcmp(&written_[peer], &fields, sizeof fields) == 0) return;
  written_[peer] = fields;
  head_->records[peer].write(fields);
  head_->changes.fetch_add(1, std::memory_order_release);
}

void PeerDirectory::beat() { head_->beat.store(now_ms(), kRelaxed); }

DirectoryStats PeerDirectory::stats() {
  const std::lock_guard guard(table_lock_);
  const TagTable& now = table();
  return {now.words(), now.live(), now.erased(), sizeof(DirectoryHead) + now.bytes(),
          generation_, left_out_};
}

Standing PeerDirectoryView::refresh() {
  Opened now = opened();
  if (now.head == nullptr || !now.head->file.is_at(path_)) {
    open_head();
    now = opened();
  }
  if (now.head == nullptr) return standing();
  const Standing standing = standing_of(*now.head);
  if (standing == Standing::Closed) let_go_of_table();
  const auto table = standing == Standing::Ready ? table_of(now) : nullptr;
  if (table != nullptr && !table->mapped_ahead.exchange(true)) table->tags.map_ahead();
  return standing == Standing::Ready && table == nullptr ? Standing::Foreign : standing;
}

// Which may be a gigabyte that has no name any more.
void PeerDirectoryView::let_go_of_table() {
  const std::lock_guard guard(lock_);
  opened_.table.reset();
}

void PeerDirectoryView::open_head() {
  int error;
  SharedFile file = SharedFile::open(path_, error);
  Opened fresh;
  if (is_head(file)) fresh.head = std::make_shared<const Head>(std::move(file));
  const std::lock_guard guard(lock_);
  // One that was removed says itself whether it was closed, or its beat does.
  if (error == ENOENT && opened_.head != nullptr) return;
  without_ = error == ENOENT ? Standing::Absent : Standing::Foreign;
  opened_ = std::move(fresh);
}

PeerDirectoryView::Opened PeerDirectoryView::opened() const {
  const std::lock_guard guard(lock_);
  return opened_;
}

Standing PeerDirectoryView::standing_of(const Head& head) const {
  if (head->closed.load(kRelaxed) != 0) return Standing::Closed;
  const uint64_t beat = head->beat.load(kRelaxed), now = now_ms();
  // A beat of the future is another clock's.
  const uint64_t apart = beat > now ? beat - now : now - beat;
  return apart > silent_ms_ ? Standing::Silent : Standing::Ready;
}

Standing PeerDirectoryView::standing() const {
  const std::lock_guard guard(lock_);
  return opened_.head == nullptr ? without_ : standing_of(*opened_.head);
}

std::shared_ptr<PeerDirectoryView::Table> PeerDirectoryView::table_of(const Opened& opened) {
  const Head& head = *opened.head;
  if (opened.table != nullptr && opened.table->generation == head->generation.load()) {
    return opened.table;
  }
  auto table = open_table(head);
  const std::lock_guard guard(lock_);
  if (opened_.head == opened.head && table != nullptr) opened_.table = table;
  return table;
}

// Null: it cannot be had.
std::shared_ptr<PeerDirectoryView::Table> PeerDirectoryView::open_table(const Head& head) const {
  for (int tries = 0; tries < kOpenTries; ++tries) {
    const uint64_t generation = head->generation.load(std::memory_order_acquire);
    int error;
    SharedFile file = SharedFile::open(table_name(path_, head->agent, generation), error);
    if (TagTable::is_whole(file, head->agent, generation))
      return std::make_shared<Table>(std::move(file), generation);
    if (error != ENOENT) return nullptr;
  }
  return nullptr;
}

// False: there is nothing to ask.
template <class Ask>
bool PeerDirectoryView::ask(uint64_t& among, const Ask& ask) {
  const Opened now = opened();
  if (now.head == nullptr || standing_of(*now.head) != Standing::Ready) return false;
  // Before the table, so that no peer is believed by a table older than the belief.
  among &= (*now.head)->believed.load();
  const auto table = among == 0 ? nullptr : table_of(now);
  if (table == nullptr) return false;
  ask(table->tags);
  return true;
}

void PeerDirectoryView::holders(std::span<const uint64_t> tags, uint64_t among, uint64_t* masks) {
  if (!ask(among, [&](const TagTable& table) { table.holders(tags, among, masks); }))
    std::fill(masks, masks + tags.size(), 0);
}

void PeerDirectoryView::exists(std::span<const uint64_t> tags, uint64_t among, uint8_t* held) {
  if (!ask(among, [&](const TagTable& table) { table.exists(tags, among, held); }))
    std::fill(held, held + tags.size(), 0);
}

std::optional<std::pair<PeerFields, PeerPulse>> PeerDirectoryView::record(unsigned peer) const {
  const Opened now = opened();
  if (now.head == nullptr) return std::nullopt;
  const PeerRecord& record = (*now.head)->records[peer];
  PeerFields fields;
  if (!record.read(fields)) return std::nullopt;
  return std::pair{fields, record.pulse()};
}

uint64_t PeerDirectoryView::changes() const {
  const Opened now = opened();
  return now.head == nullptr ? 0 : (*now.head)->changes.load(std::memory_order_acquire);
}

uint64_t PeerDirectoryView::believed() const {
  const Opened now = opened();
  return now.head == nullptr ? 0 : (*now.head)->believed.load();
}

uint64_t PeerDirectoryView::agent() const {
  const Opened now = opened();
  return now.head == nullptr ? 0 : (*now.head)->agent;
}

void PeerDirectoryView::close() {
  const std::lock_guard guard(lock_);
  opened_ = {};
  without_ = Standing::Absent;
}

}  // namespace lmcache
