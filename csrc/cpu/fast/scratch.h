// Rows in float32, and how they are shared among threads.
#pragma once

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstdint>

#include "../parallel.h"

namespace quantization_mlx::cpu {

// A task of fewer multiplications costs less than handing it to another thread.
inline constexpr int64_t task_multiplications = 1 << 16;
// Rows of up to this many floats stay on the stack.
inline constexpr unsigned usual_floats = 4096;

using Floats = c10::SmallVector<float, usual_floats>;

inline Floats floats(int64_t count) {
  Floats result;
  result.resize_for_overwrite(count);
  return result;
}

// Kernels work on whole vectors.
inline Floats whole_floats(int64_t length) { return floats((length + 15) / 16 * 16); }

// Calls function(row) for all rows, on several threads where each gets enough of them.
template <typename Function>
void for_rows(int64_t rows, int64_t length, const Function& function) {
  parallel_chunks(rows, std::max<int64_t>(1, task_multiplications / length), function);
}

}  // namespace quantization_mlx::cpu
