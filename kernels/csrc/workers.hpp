// Threads that share the pages of a batch with the thread that brings it.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stop_token>
#include <thread>
#include <vector>

namespace lmcache {

// Any number of threads may call `run` at once: each works on its own batch until nothing is left
// to start, so a batch never waits for a thread of the pool to be free.
class Workers {
 public:
  using Job = std::function<void(size_t)>;

  // `threads` counts the caller of `run`, so one makes none.
  explicit Workers(unsigned threads) : pool_(std::make_unique<Pool>(threads)) {}
  // A forked child has the pool but none of its threads: there is nobody to join, and whatever they
  // held at the fork stays held. So it is left as it is.
  ~Workers() {
    if (pool_->process != getpid()) static_cast<void>(pool_.release());
  }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Calls job(0) to job(count - 1), each once, in no order. When one throws, those not yet started
  // are left out, and the first exception is thrown here once the others have ended.
  void run(size_t count, const Job& job) {
    const size_t helpers = std::min(pool_->threads.size(), count > 0 ? count - 1 : 0);
    Batch batch(count, job);
    if (helpers > 0) pool_->offer(batch, helpers);
    batch.work();
    if (helpers > 0) pool_->withdraw(batch);
    if (batch.error) std::rethrow_exception(batch.error);
  }

 private:
  struct Batch {
    Batch(size_t n, const Job& what) : count(n), job(what) {}

    void work() {
      try {
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) job(i);
      } catch (...) {
        next.store(count, std::memory_order_relaxed);
        if (!failed.test_and_set()) error = std::current_exception();
      }
    }

    const size_t count;
    const Job& job;
    std::atomic<size_t> next = 0;
    std::atomic_flag failed;
    std::exception_ptr error;
    size_t helpers = 0;  // threads of the pool at work on it; under the pool's mutex
    std::condition_variable left;
  };

  struct Pool {
    explicit Pool(unsigned count) {
      for (unsigned i = 1; i < count; ++i)
        threads.emplace_back([this](std::stop_token stop) { serve(stop); });
    }

    void offer(Batch& batch, size_t helpers) {
      {
        const std::lock_guard lock(mutex);
        open.push_back(&batch);
      }
      for (size_t i = 0; i < helpers; ++i) offered.notify_one();
    }

    // A batch lives on its caller's stack, so nobody may be at work on it when this returns.
    void withdraw(Batch& batch) {
      std::unique_lock lock(mutex);
      std::erase(open, &batch);
      batch.left.wait(lock, [&] { return batch.helpers == 0; });
    }

    void serve(std::stop_token stop) {
      std::unique_lock lock(mutex);
      while (offered.wait(lock, stop, [this] { return !open.empty(); })) {
        Batch& batch = *open.front();
        ++batch.helpers;
        lock.unlock();
        batch.work();
        lock.lock();
        std::erase(open, &batch);  // nothing is left to start
        if (--batch.helpers == 0) batch.left.notify_one();
      }
    }

    const pid_t process = getpid();
    std::mutex mutex;
    std::condition_variable_any offered;
    std::deque<Batch*> open;
    std::vector<std::jthread> threads;  // last, so that they end before what they use
  };

  std::unique_ptr<Pool> pool_;
};

}  // namespace lmcache
