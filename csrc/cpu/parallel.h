// How tasks are shared among the threads of torch's own pool, reached without OpenMP flags.
#pragma once

#include <c10/util/FunctionRef.h>

#include <cstdint>

namespace quantization_mlx::cpu {

// Calls function(task, thread) for 0 <= task < tasks, with 0 <= thread < at::get_num_threads() and one call at a time
// of any thread. Raises the first exception of a call.
//
// Tasks that are not worth handing to other threads run in order.
void parallel_tasks(int64_t tasks, c10::function_ref<void(int64_t, int)> function, bool worth_it = true);

// Calls function(i) for 0 <= i < count, with up to `of_task` consecutive calls in a task.
template <typename Function>
void parallel_chunks(int64_t count, int64_t of_task, const Function& function) {
  parallel_tasks((count + of_task - 1) / of_task, [&](int64_t task, int) {
    for (int64_t i = task * of_task; i < count && i < (task + 1) * of_task; ++i) {
      function(i);
    }
  });
}

// Calls `body`, meanwhile keeping the other threads at hand: its calls of parallel_tasks find them waiting, which takes
// a tenth of the time of waking them for each, and a thread that comes late finds its tasks done by the others.
// Whatever else torch would run on several threads in `body` runs on one.
void with_waiting_threads(c10::function_ref<void()> body);

}  // namespace quantization_mlx::cpu
