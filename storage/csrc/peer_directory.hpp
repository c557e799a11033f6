// What this node knows of its peers, in shared memory: written by one process, read by any number
// of others without a lock. storage/peers/directory.py says more.
//
//   PATH                   the head: what is believed, and a record of each peer
//   PATH.AGENT-GENERATION  the table (tag_table.hpp) that the head names
//
// A table that is too full is copied to a larger one, of the next generation. Who reads looks at
// the head's generation once a call, and opens the new file when it has changed; until then the old
// one serves, though it has no name any more.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>

#include "failure.hpp"
#include "tag_table.hpp"

namespace lmcache {

struct PeerFields {
  static constexpr size_t kName = 64, kAddress = 256, kKey = 40;

  char name[kName];
  char address[kAddress];
  char key[kKey];
  uint64_t epoch;
  uint16_t address_bytes;
  uint16_t version;
  uint8_t name_bytes;
  uint8_t key_bytes;
  uint8_t state;  // its meaning is Python's
  uint8_t none;
};

struct PeerPulse {
  uint32_t rtt_us;
  uint32_t load;  // bytes queued
};

// The fields of one peer. Who reads them gets those of one write, never of two. There are two
// copies, written in turn, so that a writer that is stopped in the middle, or dies, leaves a whole
// one.
class alignas(64) PeerRecord {
 public:
  void write(const PeerFields& fields);
  // False: none was written yet.
  bool read(PeerFields& fields) const;
  void write_pulse(PeerPulse pulse);
  PeerPulse pulse() const;

 private:
  static constexpr size_t kWords = sizeof(PeerFields) / 8;
  static_assert(sizeof(PeerFields) % 8 == 0);

  std::atomic<uint64_t> written_;  // how often; its last bit says which copy is whole
  std::atomic<uint64_t> pulse_;
  std::atomic<uint64_t> copies_[2][kWords];
};

struct DirectoryHead {
  char magic[8];
  uint64_t agent;  // the process that writes: a number drawn at random
  alignas(64) std::atomic<uint64_t> generation;
  std::atomic<uint64_t> believed;  // peers whose words count, one bit each
  std::atomic<uint64_t> beat;      // milliseconds, CLOCK_MONOTONIC
  std::atomic<uint64_t> changes;   // of records; their pulses do not count
  std::atomic<uint64_t> closed;
  PeerRecord records[kPeers];
};

struct DirectoryStats {
  uint64_t words = 0, live = 0, erased = 0;
  uint64_t bytes = 0;       // of both files
  uint64_t generation = 0;  // 1, and one more each time that the table was made anew
  uint64_t left_out = 0;    // of all puts together
};

// The one who writes. Threads may share it.
class PeerDirectory {
 public:
  // Makes it anew, in place of what was there; who reads that is told. Throws Failure.
  PeerDirectory(const std::string& path, uint64_t bytes_most, uint64_t agent, uint64_t salt);
  ~PeerDirectory();
  PeerDirectory(const PeerDirectory&) = delete;
  PeerDirectory& operator=(const PeerDirectory&) = delete;

  // How many of the pages found no room.
  uint64_t put(unsigned peer, std::span<const uint64_t> tags);
  uint64_t drop(unsigned peer, std::span<const uint64_t> tags);  // how many there were
  void forget(unsigned peer);  // doubts it first; the peer's record stays
  void believe(unsigned peer) { head_->believed.fetch_or(uint64_t{1} << peer); }
  void doubt(unsigned peer) { head_->believed.fetch_and(~(uint64_t{1} << peer)); }
  void set_record(unsigned peer, const PeerFields& fields, PeerPulse pulse);
  void set_pulse(unsigned peer, PeerPulse pulse) { head_->records[peer].write_pulse(pulse); }
  void beat();

  uint64_t agent() const { return head_->agent; }
  uint64_t believed() const { return head_->believed; }
  uint64_t pages(unsigned peer) const { return pages_[peer]; }
  DirectoryStats stats();
  void close();  // idempotent; changes of the table fail afterwards

 private:
  std::string table_path(uint64_t generation) const;
  std::unique_ptr<TagTable> make_table(uint64_t generation, uint64_t lines) const;
  void replace_head(SharedFile made);
  void remove_tables_of_others() const;
  TagTable& table();
  bool is_crowded(size_t more) const;
  bool make_room();
  void rebuild(uint64_t lines);

  const std::string path_;
  const uint64_t bytes_most_, agent_, salt_;
  SharedFile head_file_;
  DirectoryHead* head_ = nullptr;
  std::mutex table_lock_;  // of the four that follow
  uint64_t generation_ = 1, left_out_ = 0;
  std::unique_ptr<TagTable> table_;
  std::array<std::atomic<uint64_t>, kPeers> pages_{};
  std::mutex record_lock_;  // of the records as they were last written
  std::array<PeerFields, kPeers> written_{};
};

// Whether there is a directory to believe. The values are those of Python's side.
enum class Standing : uint8_t {
  Ready,
  Absent,
  Foreign,  // no directory of this format, or not to be opened
  Closed,   // its writer has ended, or has been replaced
  Silent,   // its writer has not been heard of for too long
};

// One who reads. Threads may share it; no call waits for the writer.
class PeerDirectoryView {
 public:
  PeerDirectoryView(std::string path, uint64_t silent_ms)
      : path_(std::move(path)), silent_ms_(silent_ms) {}

  // Looks whether another directory is at the path now, and maps ahead what lookups need.
  Standing refresh();
  Standing standing() const;
  // No peer holds anything while the standing is not Ready.
  void holders(std::span<const uint64_t> tags, uint64_t among, uint64_t* masks);
  void exists(std::span<const uint64_t> tags, uint64_t among, uint8_t* held);
  // Empty: no record was written.
  std::optional<std::pair<PeerFields, PeerPulse>> record(unsigned peer) const;
  uint64_t changes() const;   // 0: no directory
  uint64_t believed() const;  // no peer: no directory
  uint64_t agent() const;     // 0: no directory
  void close();

 private:
  // What was opened. Calls under way keep it when it is replaced.
  struct Head {
    explicit Head(SharedFile from) : file(std::move(from)) {}
    const DirectoryHead& operator*() const {
      return *reinterpret_cast<DirectoryHead*>(file.data());
    }
    const DirectoryHead* operator->() const { return &**this; }
    SharedFile file;
  };
  struct Table {
    Table(SharedFile file, uint64_t generation) : tags(std::move(file)), generation(generation) {}
    TagTable tags;
    uint64_t generation;
    std::atomic<bool> mapped_ahead{false};
  };
  struct Opened {
    std::shared_ptr<const Head> head;
    std::shared_ptr<Table> table;
  };

  Opened opened() const;
  Standing standing_of(const Head& head) const;
  std::shared_ptr<Table> table_of(const Opened& opened);
  std::shared_ptr<Table> open_table(const Head& head) const;
  void open_head();
  void let_go_of_table();
  template <class Ask>
  bool ask(uint64_t& among, const Ask& ask);

  const std::string path_;
  const uint64_t silent_ms_;
  mutable std::mutex lock_;
  Opened opened_;
  Standing without_ = Standing::Absent;  // when nothing is opened
};

}  // namespace lmcache
