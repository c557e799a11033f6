// Requests carried by threads that block in preadv and pwritev. Works everywhere.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "engine.hpp"

namespace lmcache::io {

// The caller carries requests of its own batch too, so that a single page costs no change of
// threads; never those of others, whose I/O may outlast its deadline. The pool's threads serve all
// batches by turns, and callers leave them one place of the depth, so that no batch waits for the
// end of another.
class ThreadEngine : public Engine {
 public:
  explicit ThreadEngine(unsigned depth) : depth_(depth) {}

  ~ThreadEngine() override {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  const char* name() const override { return "threads"; }

  void run(Batch& batch) override {
    if (batch.size() == 0) return;
    Job job(batch);
    std::unique_lock lock(mutex_);
    call_for_help(job);
    while (job.unfinished > 0) {
      if (job.begun())
        job.progress.wait(lock);
      else
        serve(job, lock);
    }
  }

 private:
  struct Job {
    explicit Job(Batch& batch) : batch(batch), unfinished(batch.size()) {}
    bool begun() const { return next == batch.size(); }

    Batch& batch;
    size_t next = 0;
    size_t unfinished;
    std::condition_variable progress;
  };

  // How soon a batch is given up while others take up the whole depth.
  static constexpr std::chrono::milliseconds kGlance{5};

  void call_for_help(Job& job) {
    waiting_.push_back(&job);
    const size_t helpers = std::min<size_t>(job.batch.size() - 1, depth_);
    while (threads_.size() < helpers && add_thread()) {
    }
    for (size_t i = 0; i < helpers; ++i) work_.notify_one();
  }

  // Where the system has no thread to give, those there are, and the caller, do the work.
  bool add_thread() {
    try {
      threads_.emplace_back([this] { help(); });
      return true;
    } catch (const std::system_error&) {
      return false;
    }
  }

  void serve(Job& job, std::unique_lock<std::mutex>& lock) {
    if (may_begin(job)) {
      carry(job, lock);
      if (job.begun() && !waiting_.empty()) work_.notify_one();
    } else if (job.batch.passed()) {
      give_up(job);
    } else {
      if (threads_.empty()) add_thread();
      work_.notify_one();
      job.progress.wait_for(lock, kGlance);
    }
  }

  bool may_begin(const Job& job) const {
    return running_ + 1 < depth_ || (running_ < depth_ && waiting_.front() == &job);
  }

  void help() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return closing_ || (!waiting_.empty() && running_ < depth_); });
      if (closing_) return;
      Job& job = *waiting_.front();
      waiting_.pop_front();
      waiting_.push_back(&job);
      carry(job, lock);
    }
  }

  // No lock is held while bytes move.
  void carry(Job& job, std::unique_lock<std::mutex>& lock) {
    const size_t request = job.next++;
    if (job.begun()) std::erase(waiting_, &job);
    ++running_;
    lock.unlock();
    job.batch.perform(request);
    lock.lock();
    --running_;
    if (--job.unfinished == 0) job.progress.notify_one();
  }

  void give_up(Job& job) {
    for (; !job.begun(); ++job.next, --job.unfinished) job.batch.fail(job.next, ECANCELED);
    std::erase(waiting_, &job);
  }

  const unsigned depth_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<Job*> waiting_;  // have requests that nobody has begun
  std::vector<std::thread> threads_;
  unsigned running_ = 0;
  bool closing_ = false;
};

}  // namespace lmcache::io
