// Plans of kernels that have given the CPU's results on this GPU.
//
// The first use of a kernel runs it, as it is specialised there, on a small problem whose plan names the same one:
// tiles that are whole and tiles that are not, several steps along K and, where they fit the kernel's function
// constants, sizes that divide nothing. Compilers have got exactly such kernels wrong, and only for some shapes.
#pragma once

#include <cstdint>
#include <string_view>

#include "../gpu/facts.h"
#include "library.h"

namespace quantization_mlx::metal {

// What plans are made for, on the GPU that torch runs on: without the families known to fail for facts like these.
template <typename Facts>
gpu::Target current_target(const Facts& facts);

// A plan whose kernels have passed. Where one fails, warns, once for its family, and goes on to the next family; raises
// RuntimeError where none is left and, in a CI run (the environment variable CI is "true"), where any fails. For any
// thread. The environment variable QUANTIZATION_MLX_SELF_CHECK, set to 0, leaves the checks out.
template <typename Facts>
PreparedPlan checked_plan(const Facts& facts, std::string_view op);

// How many families have failed so far: plans made before the last one did may use it.
uint64_t failure_count();

}  // namespace quantization_mlx::metal
