// The GPU that torch runs on. Plain C++: also for files that are not Objective-C++.
#pragma once

#include "../gpu/traits.h"

namespace quantization_mlx::metal {

// The release of macOS, as far as it decides what kernels there are: 1400, 1500, 2600 or 2602.
int macos_version();

// An address that stands for the GPU: a process has one, but for the tests' software device, which changes.
const void* current_gpu();

// What plans are made for, read once. The environment variable QUANTIZATION_MLX_GPU names another GPU, whose kernels
// then run on this one. Raises ValueError where the name is none.
const gpu::GpuTraits& gpu_traits();

}  // namespace quantization_mlx::metal
