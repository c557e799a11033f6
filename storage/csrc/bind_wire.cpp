// What goes over sockets, as Python sees it: fetching pages from peers and sending them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "bind_pages.hpp"
#include "page_fetch.hpp"
#include "page_send.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace lmcache;

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

template <class Function>
void find(const std::map<std::string, uint64_t>& functions, const char* name, Function*& function) {
  const auto found = functions.find(name);
  if (found == functions.end() || found->second == 0)
    throw nb::value_error((std::string("no address of ") + name).c_str());
  function = reinterpret_cast<Function*>(found->second);
}

void make_libzmq(Libzmq* self, const std::map<std::string, uint64_t>& functions) {
  Libzmq zmq;
  find(functions, "zmq_msg_init", zmq.msg_init);
  find(functions, "zmq_msg_init_size", zmq.msg_init_size);
  find(functions, "zmq_msg_init_data", zmq.msg_init_data);
  find(functions, "zmq_msg_recv", zmq.msg_recv);
  find(functions, "zmq_msg_send", zmq.msg_send);
  find(functions, "zmq_msg_close", zmq.msg_close);
  find(functions, "zmq_msg_data", zmq.msg_data);
  find(functions, "zmq_msg_size", zmq.msg_size);
  find(functions, "zmq_msg_more", zmq.msg_more);
  find(functions, "zmq_poll", zmq.poll);
  find(functions, "zmq_errno", zmq.error);
  new (self) Libzmq(zmq);
}

std::string_view view(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }

std::span<const uint8_t> span(const nb::bytes& bytes) {
  return {reinterpret_cast<const uint8_t*>(bytes.c_str()), bytes.size()};
}

std::vector<WantedPage> wanted_of(const std::vector<Key>& keys, const Pages& pages) {
  pages.require(keys.size());
  std::vector<WantedPage> wanted;
  for (size_t i = 0; i < keys.size(); ++i)
    wanted.push_back({pages.pages[i], page_seed(keys[i].view())});
  return wanted;
}

// Socket, request, `Get`, `Credit`, first grant, next grant, frame, seconds to a stall, pages.
using StreamArguments = std::tuple<uint64_t, uint64_t, nb::bytes, nb::bytes, uint64_t, uint64_t,
                                   uint64_t, double, std::vector<uint32_t>>;
// How it ended, bytes, ignored messages, seconds to the first frame, seconds in all.
using StreamResult = std::tuple<int, uint64_t, uint64_t, double, double>;

// The pages of a batch and the sockets, each of which one stream may have.
class Shares {
 public:
  explicit Shares(const std::vector<WantedPage>& wanted) : wanted_(wanted), given_(wanted.size()) {}

  void take_socket(uint64_t socket) {
    if (socket == 0) throw nb::value_error("a socket is closed");
    if (!sockets_.insert(socket).second) throw nb::value_error("a socket serves one stream");
  }

  std::vector<WantedPage> take(const std::vector<uint32_t>& pages) {
    std::vector<WantedPage> share;
    for (const uint32_t page : pages) {
      if (page >= wanted_.size()) throw nb::value_error("a stream names a page beyond the batch");
      if (given_[page]) throw nb::value_error("a page is asked for by one stream");
      given_[page] = true;
      share.push_back(wanted_[page]);
    }
    return share;
  }

 private:
  const std::vector<WantedPage>& wanted_;
  std::vector<bool> given_;
  std::set<uint64_t> sockets_;
};

StreamRequest request_of(const StreamArguments& given, Shares& shares) {
  const auto& [socket, number, get, credit, first, next, frame, stall_seconds, pages] = given;
  shares.take_socket(socket);
  if (frame == 0 || next == 0 || next > first)
    throw nb::value_error("a frame has bytes, and no grant is larger than the first one");
  return {reinterpret_cast<void*>(socket),
          number,
          view(get),
          view(credit),
          first,
          next,
          frame,
          stall_seconds,
          shares.take(pages)};
}

std::pair<nb::bytes, std::vector<StreamResult>> fetch(
    const Libzmq& zmq, const std::vector<StreamArguments>& streams, const nb::list& key_objects,
    const std::vector<uint64_t>& addresses, const std::vector<uint64_t>& sizes, size_t per_page,
    double seconds, const Cancel* cancel, const std::vector<Tally*>& taken) {
  if (taken.size() != streams.size()) throw nb::value_error("a tally for each stream is wanted");
  const Pages pages(addresses, sizes, per_page);
  const auto wanted = wanted_of(keys_of(key_objects), pages);
  Shares shares(wanted);
  std::vector<StreamRequest> requests;
  for (const StreamArguments& stream : streams) requests.push_back(request_of(stream, shares));
  std::vector<StreamOutcome> outcomes;
  {
    nb::gil_scoped_release unlocked;
    outcomes = fetch_pages(zmq, requests, limits_of(seconds, cancel), taken);
  }
  std::vector<Came> came(wanted.size(), Came::Unasked);
  std::vector<StreamResult> results;
  for (size_t i = 0; i < streams.size(); ++i) {
    const auto& its_pages = std::get<8>(streams[i]);
    const StreamOutcome& each = outcomes[i];
    for (size_t page = 0; page < its_pages.size(); ++page) came[its_pages[page]] = each.pages[page];
    results.emplace_back(static_cast<int>(each.ended), each.bytes, each.ignored,
                         each.seconds_to_first, each.seconds);
  }
  return {codes_of(came), results};
}

// A FrameAcceptor and what it refers to.
class Acceptor {
 public:
  Acceptor(uint64_t request, const nb::list& keys, const std::vector<uint64_t>& addresses,
           const std::vector<uint64_t>& sizes, size_t per_page, uint64_t frame)
      : pages_(addresses, sizes, per_page),
        acceptor_(request, wanted_of(keys_of(keys), pages_), whole(frame)) {}

  int accept(const nb::bytes& body, const std::optional<nb::bytes>& payload) {
    return static_cast<int>(payload ? acceptor_.accept(span(body), span(*payload))
                                    : acceptor_.accept(span(body)));
  }

  nb::bytes came() const {
    std::vector<Came> came;
    for (size_t page = 0; page < acceptor_.size(); ++page) came.push_back(acceptor_.came(page));
    return codes_of(came);
  }

 private:
  static uint64_t whole(uint64_t frame) {
    if (frame == 0) throw nb::value_error("a frame has bytes");
    return frame;
  }

  Pages pages_;
  FrameAcceptor acceptor_;
};

using PageTuple = std::tuple<uint64_t, uint64_t, uint64_t, uint64_t>;  // place, address, bytes, sum

std::vector<OutgoingPage> pages_of(const SendBuffer& buffer, const std::vector<PageTuple>& given) {
  std::vector<OutgoingPage> pages;
  for (const auto& [place, address, bytes, checksum] : given) {
    auto* const at = reinterpret_cast<uint8_t*>(address);
    if (!buffer.has(at, bytes)) throw nb::value_error("a page lies beyond its buffer");
    pages.push_back({place, at, bytes, checksum});
  }
  return pages;
}

std::pair<int, size_t> send(const Libzmq& zmq, uint64_t socket, const nb::bytes& route,
                            uint64_t request, const std::shared_ptr<SendBuffer>& buffer,
                            const std::vector<PageTuple>& given, uint64_t frame, size_t first) {
  if (socket == 0) throw nb::value_error("the socket is closed");
  if (frame == 0) throw nb::value_error("a frame has bytes");
  const auto pages = pages_of(*buffer, given);
  const Outgoing outgoing{view(route), request, buffer, pages, frame};
  SendOutcome outcome;
  {
    nb::gil_scoped_release unlocked;
    outcome = send_frames(zmq, reinterpret_cast<void*>(socket), outgoing, first);
  }
  return {static_cast<int>(outcome.sent), outcome.frames};
}

}  // namespace

void bind_wire(nb::module_& m) {
  nb::class_<Libzmq>(m, "Libzmq").def("__init__", &make_libzmq, "functions"_a);
  nb::class_<Tally>(m, "Tally")
      .def(nb::init<>())
      .def("add", &Tally::add, "size"_a)
      .def_prop_ro("total", &Tally::total);
  nb::class_<SendBuffer>(m, "SendBuffer")
      .def_prop_ro("address",
                   [](const SendBuffer& b) { return reinterpret_cast<uint64_t>(b.address()); })
      .def_prop_ro("size", &SendBuffer::size)
      .def("keep", &SendBuffer::keep, "shown"_a)
      .def_prop_ro("in_use", [](const SendBuffer& b) { return b.frames() > 0; });
  nb::class_<SendPool>(m, "SendPool")
      .def(nb::init<size_t>(), "bytes_most"_a)
      .def("take", &SendPool::take, "size"_a, "owner"_a = 0, Unlocked())
      .def("bytes_lent_to", &SendPool::bytes_lent_to, "owner"_a)
      .def("seen", &SendPool::seen)
      .def("fileno", &SendPool::bell)
      .def("hear", &SendPool::hear)
      .def_prop_ro("bytes_lent", &SendPool::bytes_lent);
  nb::class_<Acceptor>(m, "FrameAcceptor")
      .def(nb::init<uint64_t, const nb::list&, const std::vector<uint64_t>&,
                    const std::vector<uint64_t>&, size_t, uint64_t>(),
           "request"_a, "keys"_a, "addresses"_a, "sizes"_a, "per_page"_a, "frame"_a)
      .def("accept", &Acceptor::accept, "body"_a, "payload"_a.none() = nb::none())
      .def("came", &Acceptor::came);
  m.def("fetch_pages", &fetch, "zmq"_a, "streams"_a, "keys"_a, "addresses"_a, "sizes"_a,
        "per_page"_a, "seconds"_a, "cancel"_a.none(), "taken"_a);
  m.def("send_frames", &send, "zmq"_a, "socket"_a, "route"_a, "request"_a, "buffer"_a, "pages"_a,
        "frame"_a, "first"_a);
}
