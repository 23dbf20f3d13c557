// A pool of threads for many short parallel loops in a row: workers spin while a forward pass is on, and sleep between.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace tael {

// Turns a worker waits before it sleeps, about a millisecond: the next pass of a sequence comes sooner than that, and to
// wake a sleeping thread costs a tenth of it. After the first of them it lets others have the core.
constexpr int kLinger = 30000;

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    stop_.store(true);
    epoch_.fetch_add(1);
    wake();
    for (auto& worker : workers_) worker.join();
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Between begin and end workers wait for the next loop without sleeping.
  void begin() {
    active_.store(true, std::memory_order_release);
    wake();
  }
  void end() { active_.store(false, std::memory_order_release); }

  // f(task, thread) for every task in 0..tasks-1; returns when all are done. f must not throw.
  template <class F>
  void run(int64_t tasks, const F& f) {
    if (workers_.empty() || tasks <= 1) {
      for (int64_t i = 0; i < tasks; ++i) f(i, 0);
      return;
    }
    call_ = [](const void* fn, int64_t task, int thread) { (*static_cast<const F*>(fn))(task, thread); };
    function_ = &f;
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) wake();
    take(0);
    const int others = static_cast<int>(workers_.size());
    for (int spins = 0; done_.load(std::memory_order_acquire) != others; ++spins) rest(spins);
  }

 private:
  static void rest(int spins) {
    if (spins < 4096)
      _mm_pause();
    else
      std::this_thread::yield();  // the other cores may be busy with other work
  }

  void take(int thread) {
    for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < tasks_;
         i = next_.fetch_add(1, std::memory_order_relaxed))
      call_(function_, i, thread);
  }

  void wake() {
    std::lock_guard<std::mutex> lock(mutex_);
    condition_.notify_all();
  }

  void work(int thread) {
    uint64_t seen = 0;
    while (true) {
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; ++spins) {
        if (spins < kLinger || active_.load(std::memory_order_relaxed)) {
          rest(spins);
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        condition_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != seen || active_.load(); });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        spins = 0;
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      take(thread);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  void (*call_)(const void*, int64_t, int) = nullptr;
  const void* function_ = nullptr;
  int64_t tasks_ = 0;
  alignas(64) std::atomic<uint64_t> epoch_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> active_{false};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable condition_;
};

}  // namespace tael
