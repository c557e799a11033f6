#include "page_fetch.hpp"

#include <cmath>
#include <deque>

namespace lmcache {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr unsigned kTurn = 16;           // messages of one stream before the next one has its turn
constexpr uint64_t kPartBytes = 64;      // as peers/meter.py counts a part beside its own bytes
constexpr unsigned kPartsMost = 16;      // of one message that is passed over
constexpr double kGlanceSeconds = 0.05;  // nobody tells when a call is cancelled

Came came_after(Ended ended) {
  switch (ended) {
    case Ended::Corrupt:
      return Came::Distrusted;
    case Ended::Busy:
      return Came::Busy;
    case Ended::Stalled:
      return Came::Stalled;
    case Ended::Late:
      return Came::Late;
    case Ended::Cancelled:
      return Came::Cancelled;
    default:
      return Came::Broken;
  }
}

std::span<const uint8_t> bytes_of(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

class Stream {
 public:
  Stream(const Libzmq& zmq, const StreamRequest& request, Tally& taken)
      : zmq_(zmq),
        taken_(taken),
        request_(request),
        acceptor_(request.request, request.pages, request.frame),
        body_(zmq),
        payload_(zmq),
        rest_(zmq),
        granted_(request.first_grant) {}

  bool live() const { return live_; }
  void* socket() const { return request_.socket; }
  double stalls_in() const {
    return request_.stall_seconds - Seconds(Clock::now() - useful_at_).count();
  }

  void begin() {
    if (acceptor_.all_settled()) return end(Ended::Complete);
    if (const int error = send(request_.get)) end(error == EAGAIN ? Ended::Busy : Ended::Broken);
  }

  // Takes some of what has come; says whether there was anything.
  bool turn(const Limits& limits) {
    unsigned taken = 0;
    grant();
    while (live_ && taken < kTurn && !limits.passed() && receive()) {
      ++taken;
      take();
      grant();
    }
    if (live_ && stalls_in() <= 0) end(Ended::Stalled);
    return taken > 0;
  }

  void end(Ended ended) {
    live_ = false;
    ended_ = ended;
    ended_at_ = Clock::now();
    acceptor_.give_up(came_after(ended));
  }

  StreamOutcome outcome() const {
    StreamOutcome outcome{
        ended_, bytes_, ignored_, seconds_to_first_, Seconds(ended_at_ - begun_at_).count(), {}};
    for (size_t page = 0; page < acceptor_.size(); ++page)
      outcome.pages.push_back(acceptor_.came(page));
    return outcome;
  }

 private:
  int send(std::string_view message) {
    ZmqPart part(zmq_);
    if (const int error = part.copy(bytes_of(message))) return error;
    return part.send(request_.socket, false);
  }

  // A message, of which at most two parts are kept. libzmq delivers a message with all its parts or
  // not at all, so an error after the first one is no mere waiting.
  bool receive() {
    parts_ = 0;
    do {
      ZmqPart& part = next_part();
      if (const int error = part.receive(request_.socket)) {
        if (error != EAGAIN || parts_ > 0) end(Ended::Broken);
        return false;
      }
      ++parts_;
      taken_.add(part.bytes().size() + kPartBytes);
      if (!part.more()) return true;
    } while (parts_ < kPartsMost);
    end(Ended::Broken);  // where the message ends is not known
    return false;
  }

  ZmqPart& next_part() { return parts_ == 0 ? body_ : parts_ == 1 ? payload_ : rest_; }

  Verdict verdict() {
    if (parts_ == 1) return acceptor_.accept(body_.bytes());
    if (parts_ == 2) return acceptor_.accept(body_.bytes(), payload_.bytes());
    return Verdict::NotUnderstood;
  }

  void take() {
    const Verdict given = verdict();
    if (given == Verdict::Corrupt) return end(Ended::Corrupt);
    if (!is_useful(given)) {
      ++ignored_;
      return;
    }
    useful_at_ = Clock::now();
    if (given != Verdict::Without) {
      bytes_ += payload_.bytes().size();
      if (seconds_to_first_ < 0) seconds_to_first_ = Seconds(useful_at_ - begun_at_).count();
    }
    if (acceptor_.all_settled()) end(Ended::Complete);
  }

  // Keeps as much under way as the first grant was. One that does not go out now goes later.
  void grant() {
    while (live_ && granted_ < acceptor_.bytes() &&
           granted_ - std::min(granted_, bytes_) + request_.next_grant <= request_.first_grant) {
      if (const int error = send(request_.credit)) {
        if (error != EAGAIN) end(Ended::Broken);
        return;
      }
      granted_ += request_.next_grant;
    }
  }

  const Libzmq& zmq_;
  Tally& taken_;
  const StreamRequest& request_;
  FrameAcceptor acceptor_;
  ZmqPart body_, payload_, rest_;
  unsigned parts_ = 0;  // of the message at hand
  bool live_ = true;
  Ended ended_ = Ended::Late;
  uint64_t granted_;  // bytes that may be sent, in all
  uint64_t bytes_ = 0;
  uint64_t ignored_ = 0;
  double seconds_to_first_ = -1;
  Clock::time_point begun_at_ = Clock::now(), useful_at_ = begun_at_, ended_at_ = begun_at_;
};

class Fetch {
 public:
  Fetch(const Libzmq& zmq, std::span<const StreamRequest> requests, const Limits& limits,
        std::span<Tally* const> taken)
      : zmq_(zmq), limits_(limits) {
    for (size_t i = 0; i < requests.size(); ++i) streams_.emplace_back(zmq, requests[i], *taken[i]);
  }

  void run() {
    if (limits_.passed()) return end_all(why_passed());
    for (Stream& stream : streams_) stream.begin();
    while (any_live()) {
      bool worked = false;
      for (Stream& stream : streams_)
        if (stream.live()) worked |= stream.turn(limits_);
      if (limits_.passed()) return end_all(why_passed());
      if (!worked && any_live() && !wait()) return end_all(Ended::Broken);
    }
  }

  std::vector<StreamOutcome> outcomes() const {
    std::vector<StreamOutcome> outcomes;
    for (const Stream& stream : streams_) outcomes.push_back(stream.outcome());
    return outcomes;
  }

 private:
  bool any_live() const {
    return std::any_of(streams_.begin(), streams_.end(), [](const Stream& s) { return s.live(); });
  }

  Ended why_passed() const {
    return limits_.cancelled && limits_.cancelled->load() ? Ended::Cancelled : Ended::Late;
  }

  void end_all(Ended ended) {
    for (Stream& stream : streams_)
      if (stream.live()) stream.end(ended);
  }

  // Until something came, or something is due; false when that can no longer be told.
  bool wait() {
    double seconds = std::min(kGlanceSeconds, Seconds(limits_.deadline - Clock::now()).count());
    items_.clear();
    for (const Stream& stream : streams_) {
      if (!stream.live()) continue;
      items_.push_back({stream.socket(), 0, kZmqPollIn, 0});
      seconds = std::min(seconds, stream.stalls_in());
    }
    const long milliseconds = static_cast<long>(std::ceil(std::max(seconds, 0.0) * 1e3));
    const int found = zmq_.poll(items_.data(), static_cast<int>(items_.size()), milliseconds);
    return found >= 0 || zmq_.error() == EINTR;
  }

  const Libzmq& zmq_;
  const Limits& limits_;
  std::deque<Stream> streams_;
  std::vector<ZmqPollItem> items_;
};

}  // namespace

std::vector<StreamOutcome> fetch_pages(const Libzmq& zmq, std::span<const StreamRequest> requests,
                                       const Limits& limits, std::span<Tally* const> taken) {
  Fetch fetch(zmq, requests, limits, taken);
  fetch.run();
  return fetch.outcomes();
}

}  // namespace lmcache
