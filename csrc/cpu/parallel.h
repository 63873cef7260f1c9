// torch's own thread pool, reached without OpenMP flags.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

namespace quantization_mlx::cpu {

// Calls function(task, thread) for 0 <= task < tasks, with 0 <= thread < at::get_num_threads() and one call at a time
// of any thread. at::parallel_for is a template that runs sequentially in a file compiled without OpenMP, which
// kernel-builder and Apple's compiler are; TensorIterator's loop is compiled inside libtorch. The element that each
// call would write serves as the task's number.
//
// Tasks that are not worth handing to other threads run in order.
template <typename Function>
void parallel_tasks(int64_t tasks, const Function& function, bool worth_it = true) {
  if (tasks <= 1 || !worth_it || at::get_num_threads() == 1 || at::in_parallel_region()) {
    for (int64_t task = 0; task < tasks; ++task) {
      function(task, 0);
    }
    return;
  }
  const at::Tensor numbers = at::empty({tasks}, at::TensorOptions().dtype(at::kByte));
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

// Calls function(i) for 0 <= i < count, with up to `of_task` consecutive calls in a task.
template <typename Function>
void parallel_chunks(int64_t count, int64_t of_task, const Function& function) {
  parallel_tasks((count + of_task - 1) / of_task, [&](int64_t task, int) {
    for (int64_t i = task * of_task; i < count && i < (task + 1) * of_task; ++i) {
      function(i);
    }
  });
}

}  // namespace quantization_mlx::cpu
