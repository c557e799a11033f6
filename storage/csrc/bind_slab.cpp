// SlabStore as Python sees it: one call a batch, the GIL released while it works.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

#include "bind_pages.hpp"
#include "holdings.hpp"
#include "slab_store.hpp"
#include "spill.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace lmcache;

Batch batch_of(const std::vector<Key>& keys, const Pages& pages) {
  pages.require(keys.size());
  return {keys, pages.pages, pages.bytes};
}

// None: the batch is one run of a chain. Else each page's parent, a key or empty bytes.
std::vector<Tag> parents_of(const std::vector<Key>& keys, const std::optional<nb::list>& given) {
  std::vector<Tag> parents(keys.size());
  if (given && given->size() != keys.size())
    throw nb::value_error("keys and parents must be equally many");
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!given) {
      parents[i] = i == 0 || keys[i - 1].space() != keys[i].space() ? 0 : keys[i - 1].tag();
    } else if (nb::handle object = (*given)[i]; !PyBytes_Check(object.ptr())) {
      throw nb::type_error("parents must be bytes");
    } else if (PyBytes_GET_SIZE(object.ptr()) != 0) {
      parents[i] = key_of(object).tag();
    }
  }
  return parents;
}

template <class T>
T named(const std::map<std::string, T>& names, const std::string& name) {
  const auto found = names.find(name);
  if (found == names.end()) throw nb::value_error(("no such name: " + name).c_str());
  return found->second;
}

const std::map<std::string, Spill> kSpills = {{"never", Spill::Never},
                                              {"now", Spill::Now},
                                              {"on-evict", Spill::OnEvict},
                                              {"on-touch", Spill::OnTouch},
                                              {"later", Spill::Later}};
const std::map<std::string, Sync> kSyncs = {
    {"durable", Sync::Durable}, {"ordered", Sync::Ordered}, {"volatile", Sync::Volatile}};
const std::map<std::string, PolicyKind> kPolicies = {
    {"sieve", PolicyKind::Sieve}, {"s3-fifo", PolicyKind::S3Fifo}, {"lru", PolicyKind::Lru}};

Spill spill_named(const std::string& name) { return named(kSpills, name); }

template <class T>
std::string name_of(const std::map<std::string, T>& names, T value) {
  for (const auto& [name, its] : names)
    if (its == value) return name;
  throw ControlDamaged("no such choice");
}

nb::dict agreed(const SlabStore& store) {
  const StoreOptions& options = store.options();
  nb::dict result;
  result["policy"] = name_of(kPolicies, options.policy);
  result["below"] = name_of(kSpills, options.below);
  result["sync"] = name_of(kSyncs, options.sync);
  return result;
}

StoreOptions options_of(const nb::dict& given) {
  const auto number = [&](const char* name) { return nb::cast<uint64_t>(given[name]); };
  const auto text = [&](const char* name) { return nb::cast<std::string>(given[name]); };
  const auto flag = [&](const char* name) { return nb::cast<bool>(given[name]); };
  StoreOptions options;
  options.directory = text("directory");
  options.medium = named<MediumKind>(
      {{"file", MediumKind::File}, {"memory", MediumKind::Memory}, {"none", MediumKind::None}},
      text("medium"));
  options.alone = flag("alone");
  options.shape = {number("slab_bytes"), static_cast<uint32_t>(number("slabs")),
                   static_cast<uint32_t>(number("slots_per_slab")),
                   static_cast<uint32_t>(number("ghosts"))};
  options.index_bytes = number("index_bytes");
  options.pages_most = number("pages_most");
  options.sync = named(kSyncs, text("sync"));
  options.policy = named(kPolicies, text("policy"));
  options.below = spill_named(text("below"));
  options.threads = static_cast<unsigned>(number("threads"));
  options.huge_pages = flag("huge_pages");
  options.device.queue_depth = static_cast<unsigned>(number("queue_depth"));
  options.device.direct = flag("direct");
  using Engine = DeviceOptions::Engine;
  options.device.engine = named<Engine>(
      {{"auto", Engine::Auto}, {"threads", Engine::Threads}, {"io_uring", Engine::Uring}},
      text("engine"));
  const nb::bytes id = nb::cast<nb::bytes>(given["id"]);
  if (id.size() != options.id.size()) throw nb::value_error("a store's id has 16 bytes");
  std::memcpy(options.id.data(), id.c_str(), id.size());
  return options;
}

nb::bytes get(SlabStore& store, const nb::list& key_objects, const std::vector<uint64_t>& addresses,
              const std::vector<uint64_t>& sizes, size_t per_page, double seconds,
              const Cancel* cancel) {
  const auto keys = keys_of(key_objects);
  const Pages pages(addresses, sizes, per_page);
  const Batch batch = batch_of(keys, pages);
  std::vector<Lookup> outcome;
  {
    nb::gil_scoped_release unlocked;
    outcome = store.get(batch, limits_of(seconds, cancel));
  }
  return codes_of(outcome);
}

nb::bytes put(SlabStore& store, const nb::list& key_objects, const std::vector<uint64_t>& addresses,
              const std::vector<uint64_t>& sizes, size_t per_page,
              const std::optional<std::vector<uint64_t>>& checksums,
              const std::optional<nb::list>& parent_objects, const std::string& spill,
              double seconds, const Cancel* cancel) {
  const auto keys = keys_of(key_objects);
  const auto parents = parents_of(keys, parent_objects);
  const Pages pages(addresses, sizes, per_page);
  const Batch batch = batch_of(keys, pages);
  const Spill what = spill_named(spill);
  const std::vector<uint64_t> none;
  const std::vector<uint64_t>& sums = checksums ? *checksums : none;
  if (checksums && sums.size() != keys.size())
    throw nb::value_error("keys and checksums must be equally many");
  std::vector<Stored> outcome;
  {
    nb::gil_scoped_release unlocked;
    outcome = store.put(batch, sums, parents, what, limits_of(seconds, cancel));
  }
  return codes_of(outcome);
}

std::vector<bool> exists(SlabStore& store, const nb::list& key_objects) {
  const auto keys = keys_of(key_objects);
  nb::gil_scoped_release unlocked;
  return store.exists(keys);
}

std::vector<bool> used_again(SlabStore& store, const nb::list& key_objects) {
  const auto keys = keys_of(key_objects);
  nb::gil_scoped_release unlocked;
  return store.used_again(keys);
}

size_t remove_pages(SlabStore& store, const nb::list& key_objects, double seconds) {
  const auto keys = keys_of(key_objects);
  nb::gil_scoped_release unlocked;
  return store.remove(keys, deadline_in(seconds));
}

std::string space_of(const nb::bytes& space) {
  if (space.size() != kNamespaceBytes) throw nb::value_error("a namespace has 16 bytes");
  return {space.c_str(), space.size()};
}

size_t clear(SlabStore& store, const nb::bytes& space, double seconds) {
  const std::string name = space_of(space);
  nb::gil_scoped_release unlocked;
  return store.clear(name, deadline_in(seconds));
}

void pin(SlabStore& store, const nb::list& key_objects, uint32_t until, double seconds) {
  const auto keys = keys_of(key_objects);
  nb::gil_scoped_release unlocked;
  store.pin(keys, until, deadline_in(seconds));
}

void set_quota(SlabStore& store, const nb::bytes& space, uint64_t bytes, double seconds) {
  const std::string name = space_of(space);
  nb::gil_scoped_release unlocked;
  store.set_quota(name, bytes, deadline_in(seconds));
}

nb::bytes tags(SlabStore& store, const std::optional<std::vector<nb::bytes>>& spaces,
               uint64_t least) {
  std::optional<std::vector<std::string>> names;
  if (spaces) names.emplace();
  for (size_t i = 0; names && i < spaces->size(); ++i) names->push_back(space_of((*spaces)[i]));
  std::vector<uint64_t> tags;
  {
    nb::gil_scoped_release unlocked;
    tags = Holdings(store).tags(names, least);
  }
  return nb::bytes(tags.data(), tags.size() * sizeof(uint64_t));
}

std::shared_ptr<Shown> show(SlabStore& store, const nb::list& key_objects,
                            const std::vector<uint64_t>& sizes, double seconds) {
  const auto keys = keys_of(key_objects);
  if (keys.size() != sizes.size()) throw nb::value_error("keys and sizes must be equally many");
  nb::gil_scoped_release unlocked;
  return store.show(keys, sizes, deadline_in(seconds));
}

// Of each page: its place among those asked for, its address and its checksum.
std::vector<std::tuple<size_t, uint64_t, uint64_t>> pages_of(const Shown& shown) {
  std::vector<std::tuple<size_t, uint64_t, uint64_t>> pages;
  for (size_t i = 0; i < shown.pages.size(); ++i) {
    const Lent& page = shown.pages[i];
    pages.emplace_back(shown.places[i], reinterpret_cast<uint64_t>(page.page.address),
                       page.checksum);
  }
  return pages;
}

nb::dict counts(SlabStore& store) {
  const Counts counts = store.counts();
  nb::dict result;
  result["pages"] = counts.pages;
  result["bytes"] = counts.bytes;
  result["reserved"] = counts.reserved;
  result["reserved_bytes"] = counts.reserved_bytes;
  result["spilling_bytes"] = counts.spilling_bytes;
  result["asked_pages"] = counts.asked;
  result["evicted"] = counts.evicted;
  result["dirty_pages"] = counts.dirty_pages;
  result["dirty_bytes"] = counts.dirty_bytes;
  result["lost"] = counts.lost;
  result["held"] = counts.held;
  result["index_bytes"] = counts.index_bytes;
  result["tree_bytes"] = counts.tree_bytes;
  return result;
}

nb::tuple check(SlabStore& store, bool repair, double seconds) {
  Check report;
  {
    nb::gil_scoped_release unlocked;
    report = store.check(repair, {deadline_in(seconds), nullptr});
  }
  nb::list corrupt;
  for (const Key& key : report.corrupt) corrupt.append(nb::bytes(key.bytes.data(), kKeyBytes));
  return nb::make_tuple(report.pages, corrupt, report.problems);
}

nb::dict spill_into(SlabStore& upper, SlabStore& lower, uint64_t bytes_most, double seconds) {
  Spilled done;
  {
    nb::gil_scoped_release unlocked;
    done = spill(upper, lower, bytes_most, {deadline_in(seconds), nullptr});
  }
  nb::dict result;
  result["pages"] = done.pages;
  result["bytes"] = done.bytes;
  result["refused"] = done.refused;
  result["failed"] = done.failed;
  result["damaged"] = done.damaged;
  return result;
}

// A Failure as (reason, detail).
void bind_failure(nb::module_& m) {
  static nb::object type;
  type = nb::steal(
      PyErr_NewException("lmcache_sglang.storage._native.StoreFailure", nullptr, nullptr));
  m.attr("StoreFailure") = type;
  nb::register_exception_translator([](const std::exception_ptr& raised, void*) {
    try {
      std::rethrow_exception(raised);
    } catch (const Failure& failure) {
      const nb::tuple about = nb::make_tuple(name_of(failure.reason), failure.what());
      PyErr_SetObject(type.ptr(), about.ptr());
    } catch (const std::system_error& error) {
      PyErr_SetObject(type.ptr(), nb::make_tuple("io", error.what()).ptr());
    }
  });
}

}  // namespace

void bind_slab(nb::module_& m) {
  bind_failure(m);
  nb::class_<Shown>(m, "Shown").def_prop_ro("pages", &pages_of);
  nb::class_<SlabStore>(m, "SlabStore")
      .def(
          "__init__",
          [](SlabStore* self, const nb::dict& options) {
            const StoreOptions native = options_of(options);
            nb::gil_scoped_release unlocked;
            new (self) SlabStore(native);
          },
          "options"_a)
      .def("exists", &exists, "keys"_a)
      .def("get", &get, "keys"_a, "addresses"_a, "sizes"_a, "per_page"_a, "seconds"_a,
           "cancel"_a.none() = nb::none())
      .def("put", &put, "keys"_a, "addresses"_a, "sizes"_a, "per_page"_a, "checksums"_a.none(),
           "parents"_a.none(), "spill"_a, "seconds"_a, "cancel"_a.none() = nb::none())
      .def("remove", &remove_pages, "keys"_a, "seconds"_a)
      .def("clear", &clear, "space"_a, "seconds"_a)
      .def("pin", &pin, "keys"_a, "until"_a, "seconds"_a)
      .def("set_quota", &set_quota, "space"_a, "most"_a, "seconds"_a)
      .def("used_again", &used_again, "keys"_a)
      .def("tags", &tags, "spaces"_a.none(), "least"_a)
      .def(
          "changed", [](SlabStore& store) { return Holdings(store).changed(); }, kUnlocked)
      .def("counts", &counts)
      .def("check", &check, "repair"_a, "seconds"_a)
      .def("spill", &spill_into, "lower"_a, "bytes_most"_a, "seconds"_a)
      .def("show", &show, "keys"_a, "sizes"_a, "seconds"_a)
      .def(
          "unshow",
          [](SlabStore& store, const Shown& shown, double seconds) {
            store.unshow(shown, deadline_in(seconds));
          },
          "shown"_a, "seconds"_a, kUnlocked)
      .def(
          "queue_unspilled",
          [](SlabStore& store, bool touched_only, uint64_t bytes_most, double seconds) {
            return store.queue_unspilled(touched_only, bytes_most, deadline_in(seconds));
          },
          "touched_only"_a, "bytes_most"_a, "seconds"_a, kUnlocked)
      .def(
          "sweep",
          [](SlabStore& store, double seconds) { return store.sweep(deadline_in(seconds)); },
          "seconds"_a, kUnlocked)
      .def("work_seen", &SlabStore::work_seen)
      .def("wake", &SlabStore::wake)
      .def(
          "wait_for_work",
          [](SlabStore& store, uint32_t seen, double seconds) {
            return store.wait_for_work(seen, deadline_in(seconds));
          },
          "seen"_a, "seconds"_a, kUnlocked)
      .def("room_seen", &SlabStore::room_seen)
      .def(
          "wait_for_room",
          [](SlabStore& store, uint32_t seen, double seconds) {
            return store.wait_for_room(seen, deadline_in(seconds));
          },
          "seen"_a, "seconds"_a, kUnlocked)
      .def("describe", &SlabStore::describe)
      .def("agreed", &agreed)
      .def(
          "pin_memory",
          [](SlabStore& store, const std::string& driver) { return store.pin_memory(driver); },
          "driver"_a, kUnlocked)
      .def("damaged_at_open", &SlabStore::damaged_at_open);
  m.def(
      "control_bytes",
      [](uint64_t slab_bytes, uint32_t slabs, uint32_t slots_per_slab, uint32_t ghosts) {
        return Shape{slab_bytes, slabs, slots_per_slab, ghosts}.control_bytes();
      },
      "slab_bytes"_a, "slabs"_a, "slots_per_slab"_a, "ghosts"_a);
}
