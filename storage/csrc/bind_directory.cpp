// The directory of peers as Python sees it: one call a batch, the GIL released while it works.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <vector>

#include "bind_pages.hpp"
#include "page_tag.hpp"
#include "peer_directory.hpp"
#include "tag_sets.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace lmcache;

using Tags = std::vector<uint64_t>;

Tags tags_of(const nb::list& keys) {
  Tags tags;
  tags.reserve(keys.size());
  for (nb::handle key : keys) tags.push_back(page_tag(key_text(key).data()));
  return tags;
}

// Copied: Python's bytes need not lie where a number may.
Tags tags_in(const nb::bytes& packed) {
  if (packed.size() % sizeof(uint64_t) != 0) throw nb::value_error("a tag has 8 bytes");
  Tags tags(packed.size() / sizeof(uint64_t));
  if (!tags.empty()) std::memcpy(tags.data(), packed.c_str(), packed.size());
  return tags;
}

nb::bytes packed(const Tags& tags) {
  return nb::bytes(tags.data(), tags.size() * sizeof(uint64_t));
}

unsigned peer_of(unsigned peer) {
  if (peer >= kPeers) throw nb::value_error("a peer is a number from 0 to 63");
  return peer;
}

nb::bytes holders(PeerDirectoryView& view, const nb::list& keys, uint64_t among) {
  Tags tags = tags_of(keys);
  {
    nb::gil_scoped_release unlocked;
    view.holders(tags, among, tags.data());  // each mask after its tag was read
  }
  return packed(tags);
}

nb::list exists(PeerDirectoryView& view, const nb::list& keys, uint64_t among) {
  const Tags tags = tags_of(keys);
  std::vector<uint8_t> held(tags.size());
  {
    nb::gil_scoped_release unlocked;
    view.exists(tags, among, held.data());
  }
  nb::list answer = nb::steal<nb::list>(PyList_New(static_cast<Py_ssize_t>(held.size())));
  if (!answer.is_valid()) throw nb::python_error();
  for (size_t i = 0; i < held.size(); ++i)
    PyList_SET_ITEM(answer.ptr(), static_cast<Py_ssize_t>(i), PyBool_FromLong(held[i]));
  return answer;
}

template <size_t kMost>
size_t copy_text(char (&into)[kMost], const nb::bytes& text) {
  if (text.size() > kMost) throw nb::value_error("a field of a peer's record is too long");
  std::memcpy(into, text.c_str(), text.size());
  return text.size();
}

template <size_t kMost>
nb::bytes text_in(const char (&text)[kMost], size_t bytes) {
  return nb::bytes(text, std::min(bytes, kMost));
}

void set_record(PeerDirectory& directory, unsigned peer, const nb::bytes& name,
                const nb::bytes& address, const nb::bytes& key, uint8_t state, uint16_t version,
                uint64_t epoch, uint32_t rtt_us, uint32_t load) {
  PeerFields fields{};
  fields.name_bytes = static_cast<uint8_t>(copy_text(fields.name, name));
  fields.address_bytes = static_cast<uint16_t>(copy_text(fields.address, address));
  fields.key_bytes = static_cast<uint8_t>(copy_text(fields.key, key));
  fields.state = state;
  fields.version = version;
  fields.epoch = epoch;
  peer_of(peer);
  nb::gil_scoped_release unlocked;
  directory.set_record(peer, fields, {rtt_us, load});
}

nb::object record(const PeerDirectoryView& view, unsigned peer) {
  const auto found = view.record(peer_of(peer));
  if (!found) return nb::none();
  const auto& [fields, pulse] = *found;
  return nb::make_tuple(text_in(fields.name, fields.name_bytes),
                        text_in(fields.address, fields.address_bytes),
                        text_in(fields.key, fields.key_bytes), fields.state, fields.version,
                        fields.epoch, pulse.rtt_us, pulse.load);
}

nb::dict stats(PeerDirectory& directory) {
  DirectoryStats stats;
  {
    nb::gil_scoped_release unlocked;
    stats = directory.stats();
  }
  nb::dict result;
  result["words"] = stats.words;
  result["live"] = stats.live;
  result["erased"] = stats.erased;
  result["bytes"] = stats.bytes;
  result["generation"] = stats.generation;
  result["left_out"] = stats.left_out;
  return result;
}

// `put` or `drop`: how many of the tags found no room, or were there.
template <uint64_t (PeerDirectory::*kChange)(unsigned, std::span<const uint64_t>)>
uint64_t change(PeerDirectory& directory, unsigned peer, const nb::bytes& given) {
  const Tags tags = tags_in(given);
  peer_of(peer);
  nb::gil_scoped_release unlocked;
  return (directory.*kChange)(peer, tags);
}

// A function of two sets of tags, with packed ones.
template <Tags (*kOf)(const Tags&, const Tags&)>
nb::bytes of_two(const nb::bytes& one, const nb::bytes& other) {
  const Tags a = tags_in(one), b = tags_in(other);
  Tags result;
  {
    nb::gil_scoped_release unlocked;
    result = kOf(a, b);
  }
  return packed(result);
}

void bind_writer(nb::module_& m) {
  nb::class_<PeerDirectory>(m, "PeerDirectory")
      .def(nb::init<const std::string&, uint64_t, uint64_t, uint64_t>(), "path"_a, "most_bytes"_a,
           "agent"_a, "salt"_a, kUnlocked)
      .def("put", &change<&PeerDirectory::put>, "peer"_a, "tags"_a)
      .def("drop", &change<&PeerDirectory::drop>, "peer"_a, "tags"_a)
      .def(
          "forget", [](PeerDirectory& it, unsigned peer) { it.forget(peer_of(peer)); }, "peer"_a,
          kUnlocked)
      .def(
          "believe", [](PeerDirectory& it, unsigned peer) { it.believe(peer_of(peer)); }, "peer"_a)
      .def(
          "doubt", [](PeerDirectory& it, unsigned peer) { it.doubt(peer_of(peer)); }, "peer"_a)
      .def("set_record", &set_record, "peer"_a, "name"_a, "address"_a, "key"_a, "state"_a,
           "version"_a, "epoch"_a, "rtt_us"_a, "load"_a)
      .def(
          "set_pulse",
          [](PeerDirectory& it, unsigned peer, uint32_t rtt_us, uint32_t load) {
            it.set_pulse(peer_of(peer), {rtt_us, load});
          },
          "peer"_a, "rtt_us"_a, "load"_a)
      .def("beat", &PeerDirectory::beat)
      .def(
          "pages", [](const PeerDirectory& it, unsigned peer) { return it.pages(peer_of(peer)); },
          "peer"_a)
      .def("believed", &PeerDirectory::believed)
      .def("stats", &stats)
      .def("close", &PeerDirectory::close, kUnlocked);
}

void bind_reader(nb::module_& m) {
  const auto code = [](Standing standing) { return static_cast<int>(standing); };
  nb::class_<PeerDirectoryView>(m, "PeerDirectoryView")
      .def(nb::init<std::string, uint64_t>(), "path"_a, "silent_ms"_a)
      .def(
          "refresh", [code](PeerDirectoryView& it) { return code(it.refresh()); }, kUnlocked)
      .def("standing", [code](const PeerDirectoryView& it) { return code(it.standing()); })
      .def("holders", &holders, "keys"_a, "among"_a)
      .def("exists", &exists, "keys"_a, "among"_a)
      .def("record", &record, "peer"_a)
      .def("changes", &PeerDirectoryView::changes)
      .def("believed", &PeerDirectoryView::believed)
      .def("agent", &PeerDirectoryView::agent)
      .def("close", &PeerDirectoryView::close, kUnlocked);
}

}  // namespace

void bind_directory(nb::module_& m) {
  bind_writer(m);
  bind_reader(m);
  m.def("tags_of", [](const nb::list& keys) { return packed(tags_of(keys)); }, "keys"_a);
  m.def("merge_tags", &of_two<&tags_of_either>, "one"_a, "other"_a);
  m.def("tags_without", &of_two<&tags_without>, "tags"_a, "others"_a);
  m.def(
      "sorted_tags",
      [](const nb::bytes& given) {
        Tags tags = tags_in(given);
        {
          nb::gil_scoped_release unlocked;
          sort_tags(tags);
        }
        return packed(tags);
      },
      "tags"_a);
}
