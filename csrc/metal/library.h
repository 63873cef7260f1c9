// Pipelines of the shaders in metal/, compiled or loaded at their first use and kept. Plain C++.
#pragma once

#include <vector>

#include "../gpu/plan.h"

namespace quantization_mlx::metal {

using Pipeline = void*;  // id<MTLComputePipelineState>

// A plan whose kernels are compiled: by launch, its pipeline.
struct PreparedPlan {
  gpu::Plan plan;
  std::vector<Pipeline> pipelines;
};

// For any thread; different kernels are compiled at the same time. Raises RuntimeError with the text of Metal's
// compiler where there is no such pipeline.
PreparedPlan prepared(gpu::Plan plan);

}  // namespace quantization_mlx::metal
