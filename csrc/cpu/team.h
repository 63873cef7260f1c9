// Threads that stay at hand for one thread's tasks. No torch types here, so that it can be tested by itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>

namespace quantization_mlx::cpu {

// Waits a little longer each time: what is waited for mostly comes within microseconds, unless its thread is not
// running.
class Patience {
 public:
  void wait() {
    if (++waits_ < short_waits) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
  void renew() { waits_ = 0; }

 private:
  static constexpr int short_waits = 5000;

  static void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  int waits_ = 0;
};

// Threads that take the tasks of one thread's calls, one after the other. `tickets_` says which call this is and how
// many of its tasks nobody has taken; who takes one may read the call's function and number of tasks, which stay as
// they are until all that were taken are done.
class Team {
 public:
  static constexpr int64_t most_tasks = 0xffffffff;

  // Calls function(task, thread) for 0 <= task < tasks, here as thread 0 and by those who help, and raises the first
  // exception of a call. Not for a task to call.
  template <typename Function>
  void share(int64_t tasks, const Function& function) {
    function_ = &function;
    call_function_ = [](const void* context, int64_t task, int thread) {
      (*static_cast<const Function*>(context))(task, thread);
    };
    tasks_ = tasks;
    undone_.store(tasks, std::memory_order_relaxed);
    failure_ = nullptr;
    call_ = (call_ + 1) % closed_call;
    tickets_.store(call_ << 32 | static_cast<uint64_t>(tasks), std::memory_order_release);
    while (take_one(0)) {
    }
    Patience patience;
    while (undone_.load(std::memory_order_acquire) > 0) {
      patience.wait();
    }
    if (failure_) {
      std::rethrow_exception(failure_);
    }
  }

  // Takes tasks until the team is closed, which `share` may not be called after.
  void help(int thread) {
    Patience patience;
    while (tickets_.load(std::memory_order_relaxed) >> 32 != closed_call) {
      if (take_one(thread)) {
        patience.renew();
      } else {
        patience.wait();
      }
    }
  }

  void close() { tickets_.store(closed_call << 32, std::memory_order_relaxed); }

 private:
  static constexpr uint64_t closed_call = 0xffffffff;

  bool take_one(int thread) {
    uint64_t tickets = tickets_.load(std::memory_order_relaxed);
    do {
      if (static_cast<uint32_t>(tickets) == 0) {
        return false;
      }
    } while (!tickets_.compare_exchange_weak(tickets, tickets - 1, std::memory_order_acquire));
    try {
      call_function_(function_, tasks_ - static_cast<uint32_t>(tickets), thread);
    } catch (...) {
      const std::lock_guard lock(failing_);
      failure_ = failure_ ? failure_ : std::current_exception();
    }
    undone_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  std::atomic<uint64_t> tickets_{0};
  std::atomic<int64_t> undone_{0};
  uint64_t call_ = 0;
  const void* function_ = nullptr;
  void (*call_function_)(const void*, int64_t, int) = nullptr;
  int64_t tasks_ = 0;
  std::mutex failing_;
  std::exception_ptr failure_;
};

}  // namespace quantization_mlx::cpu
