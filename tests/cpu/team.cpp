// Team by itself: every task once, its results seen by the caller, exceptions passed on, with threads that come late,
// sleep, or never come. Compiled with ThreadSanitizer, it reports accesses that nothing orders.
#include "cpu/team.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace {

using quantization_mlx::cpu::Team;

void check(bool holds, const char* what, int64_t number) {
  if (!holds) {
    std::fprintf(stderr, "%s: %lld\n", what, static_cast<long long>(number));
    std::exit(1);
  }
}

// Calls body(team) while `helpers` threads help, of which every third comes late.
template <typename Body>
void with_team(int helpers, const Body& body) {
  Team team;
  std::vector<std::thread> threads;
  for (int thread = 1; thread <= helpers; ++thread) {
    threads.emplace_back([&team, thread] {
      if (thread % 3 == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(thread));
      }
      team.help(thread);
    });
  }
  body(team);
  team.close();
  for (std::thread& thread : threads) {
    thread.join();
  }
}

void every_task_runs_once(Team& team, int helpers) {
  for (int64_t call = 0; call < 2000; ++call) {
    const int64_t tasks = 1 + call * 7 % 40;
    std::vector<int64_t> results(tasks, 0);
    team.share(tasks, [&](int64_t task, int thread) {
      check(thread >= 0 && thread <= helpers, "thread", thread);
      if (task == 3 && call % 100 == 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(200));  // as one that does not run for a while
      }
      results[task] += call + task;
    });
    for (int64_t task = 0; task < tasks; ++task) {
      check(results[task] == call + task, "task", task);
    }
  }
}

// A scratch of each thread is used by one task at a time.
void threads_have_tasks_one_by_one(Team& team, int helpers) {
  std::vector<int64_t> scratch(helpers + 1, 0);
  int64_t sum = 0;
  for (int64_t call = 0; call < 500; ++call) {
    team.share(17, [&](int64_t task, int thread) { scratch[thread] += task; });
    sum += 17 * 16 / 2;
  }
  for (const int64_t part : scratch) {
    sum -= part;
  }
  check(sum == 0, "sum", sum);
}

void exceptions_reach_the_caller(Team& team, int) {
  for (int64_t call = 0; call < 200; ++call) {
    std::atomic<int64_t> calls{0};
    bool is_caught = false;
    try {
      team.share(9, [&](int64_t task, int) {
        ++calls;
        if (task % 4 == call % 4) {
          throw std::runtime_error("task");
        }
      });
    } catch (const std::runtime_error&) {
      is_caught = true;
    }
    check(is_caught && calls == 9, "calls", calls);
  }
}

}  // namespace

int main() {
  for (const int helpers : {0, 1, 3, 7}) {
    for (const auto& test : {every_task_runs_once, threads_have_tasks_one_by_one, exceptions_reach_the_caller}) {
      with_team(helpers, [&](Team& team) { test(team, helpers); });
    }
  }
  return 0;
}
