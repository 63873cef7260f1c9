#include "parallel.h"

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include <thread>
#include <utility>

#include "team.h"

namespace quantization_mlx::cpu {
namespace {

using Task = c10::function_ref<void(int64_t, int)>;

// Calls function(i, thread) for 0 <= i < count, each thread with an equal share of adjacent numbers.
//
// at::parallel_for is a template that runs sequentially in a file compiled without OpenMP, which kernel-builder and
// Apple's compiler are; TensorIterator's loop is compiled inside libtorch. The element that each call would write
// serves as its number.
void on_pool(int64_t count, Task function) {
  const at::Tensor numbers = at::empty({count}, at::TensorOptions().dtype(at::kByte));
  const char* const first = static_cast<const char*>(numbers.const_data_ptr());
  auto iterator = at::TensorIteratorConfig()
                      .add_output(numbers)
                      .resize_outputs(false)
                      .set_check_mem_overlap(false)
                      .check_all_same_dtype(false)
                      .build();
  iterator.for_each(
      [&](char** data, const int64_t*, int64_t inner, int64_t outer) {
        for (int64_t i = 0; i < inner * outer; ++i) {
          function(data[0] - first + i, at::get_thread_num());
        }
      },
      /*grain_size=*/1);
}

// That of the thread whose calls it serves, outside of these calls' tasks.
thread_local Team* own_team = nullptr;

// Closes a team at the end of its scope, however that is left.
class Closing {
 public:
  explicit Closing(Team& team) : team_(team) {}
  Closing(const Closing&) = delete;
  Closing& operator=(const Closing&) = delete;
  ~Closing() { team_.close(); }

 private:
  Team& team_;
};

// While one lives, its thread has this team.
class OwnTeam {
 public:
  explicit OwnTeam(Team* team) : before_(std::exchange(own_team, team)) {}
  OwnTeam(const OwnTeam&) = delete;
  OwnTeam& operator=(const OwnTeam&) = delete;
  ~OwnTeam() { own_team = before_; }

 private:
  Team* before_;
};

}  // namespace

void parallel_tasks(int64_t tasks, Task function, bool worth_it) {
  if (tasks > 1 && worth_it && own_team != nullptr && tasks <= Team::most_tasks) {
    Team& team = *own_team;
    const OwnTeam none(nullptr);
    team.share(tasks, function);
  } else if (tasks > 1 && worth_it && at::get_num_threads() > 1 && !at::in_parallel_region()) {
    on_pool(tasks, function);
  } else {
    for (int64_t task = 0; task < tasks; ++task) {
      function(task, 0);
    }
  }
}

void with_waiting_threads(c10::function_ref<void()> body) {
  if (at::get_num_threads() == 1 || at::in_parallel_region()) {
    body();
    return;
  }
  Team team;
  const auto caller = std::this_thread::get_id();
  const auto lead = [&] {
    const OwnTeam own(&team);
    const Closing closing(team);
    body();
  };
  bool has_led = false;
  on_pool(at::get_num_threads(), [&](int64_t, int thread) {
    if (std::this_thread::get_id() != caller) {
      team.help(thread);
    } else if (!has_led) {
      has_led = true;
      lead();
    }
  });
}

}  // namespace quantization_mlx::cpu
