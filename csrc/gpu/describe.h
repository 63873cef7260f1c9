// Plans as JSON:
// {"device": "mps", "gpu": ..., "excluded": [...], "workspace": ...,
//  "launches": [{"kernel", "file", "instance", "family", "constants": [...], "threadgroups": [...], "threads",
//                "arguments": [[role, offset], ...], "params_index", "params": bytes in hexadecimal}]}
#pragma once

#include <string>

#include "plan.h"

namespace quantization_mlx::gpu {

std::string describe(const Plan& plan, const Target& target);

// The plan of any problem.
template <typename Problem>
std::string explain(const Problem& problem, const Target& target) {
  return describe(plan(with_kernel_dtype(problem), target), target);
}

}  // namespace quantization_mlx::gpu
