// Pipelines of the shaders in metal/, compiled or loaded at their first use and kept.
#pragma once

#import <Metal/Metal.h>

#include "../gpu/plan.h"

namespace quantization_mlx::metal {

// For any thread. Raises RuntimeError with the text of Metal's compiler where there is no such pipeline.
id<MTLComputePipelineState> pipeline(const gpu::Launch& launch);

}  // namespace quantization_mlx::metal
