// A pool of threads that work through a list of operations together.
//
// An operation is cut into chunks. Threads take chunks until there are none left, and whoever finishes the last one opens
// the next operation, so a thread that the machine has stopped delays nothing but the chunk it is at. Which thread computes
// a chunk never changes its result.
#pragma once
#include <immintrin.h>
#include <sched.h>
#include <stdint.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

class Work {
 public:
  virtual int num_operations() const = 0;
  virtual int num_chunks(int operation) const = 0;
  virtual void run(int operation, int chunk, int thread) = 0;
};

class Pool {
 public:
  explicit Pool(int num_threads) {
    for (int thread = 1; thread < num_threads; ++thread) helpers_.emplace_back([this, thread] { help(thread); });
  }

  ~Pool() {
    stopping_ = true;
    wake();
    for (std::thread& helper : helpers_) helper.join();
  }

  int num_threads() const { return (int)helpers_.size() + 1; }

  void run(Work* work) {
    work_ = work;
    finished_ = false;
    open(0);
    for (int idle = 0; !finished_;) idle = take_chunk(0) ? 0 : pause(idle + 1);
  }

 private:
  // operation, number of chunks, next chunk in one word: whoever takes a chunk knows all three belong together
  static constexpr int CHUNK_BITS = 20;
  static constexpr uint64_t CHUNK_MASK = (1 << CHUNK_BITS) - 1;
  // a helper that finds nothing to do for so long sleeps: longer than what lies between two operations, and shorter than
  // a step, as somebody else may have use for the core
  static constexpr auto SPIN_TIME = std::chrono::microseconds(100);
  static constexpr int SPINS_BEFORE_YIELD = 2000;

  void open(int operation) {
    done_.store(0, std::memory_order_relaxed);
    if (operation == work_->num_operations()) {
      ticket_ = 0;
      finished_ = true;
      return;
    }
    ticket_ = (uint64_t)operation << 2 * CHUNK_BITS | (uint64_t)work_->num_chunks(operation) << CHUNK_BITS;
    if (num_asleep_ > 0) wake();
  }

  static bool has_chunk(uint64_t ticket) { return (ticket & CHUNK_MASK) < (ticket >> CHUNK_BITS & CHUNK_MASK); }

  bool take_chunk(int thread) {
    if (!has_chunk(ticket_)) return false;
    uint64_t ticket = ticket_.fetch_add(1);
    if (!has_chunk(ticket)) return false;
    int operation = (int)(ticket >> 2 * CHUNK_BITS);
    work_->run(operation, (int)(ticket & CHUNK_MASK), thread);
    if (done_.fetch_add(1) + 1 == (ticket >> CHUNK_BITS & CHUNK_MASK)) open(operation + 1);
    return true;
  }

  static int pause(int idle) {
    if (idle % SPINS_BEFORE_YIELD) _mm_pause();
    else sched_yield();
    return idle;
  }

  void help(int thread) {
    while (!stopping_) {
      if (take_chunk(thread)) continue;
      auto until = std::chrono::steady_clock::now() + SPIN_TIME;
      int idle = 0;
      while (!has_chunk(ticket_) && !stopping_) {
        if (++idle % 64 == 0 && std::chrono::steady_clock::now() > until) {
          sleep();
          break;
        }
        pause(idle);
      }
    }
  }

  void sleep() {
    std::unique_lock<std::mutex> lock(mutex_);
    ++num_asleep_;
    work_to_do_.wait(lock, [this] { return has_chunk(ticket_) || stopping_; });
    --num_asleep_;
  }

  void wake() {
    std::lock_guard<std::mutex> lock(mutex_);
    work_to_do_.notify_all();
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> finished_{false};
  std::atomic<bool> stopping_{false};
  Work* work_ = nullptr;
  std::mutex mutex_;
  std::condition_variable work_to_do_;
  std::vector<std::thread> helpers_;
};
