// The GPU that torch runs on. Plain C++: also for files that are not Objective-C++.
#pragma once

#include "../gpu/traits.h"

namespace quantization_mlx::metal {

// The release of macOS, as far as it decides what kernels there are: 1400, 1500, 2600 or 2602.
int macos_version();

// What plans are made for. The environment variable QUANTIZATION_MLX_GPU names another GPU, whose kernels then run on
// this one. Raises ValueError where the name is none.
gpu::GpuTraits gpu_traits();

}  // namespace quantization_mlx::metal
