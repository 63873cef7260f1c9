// Plans of kernels that have given the CPU's results on this GPU.
//
// The first use of a kernel family, for a format, a dtype and a form of the product, runs small products that need
// every part of a tile. Compilers have got exactly such kernels wrong, and only for more rows than a quick look tries.
// Gathered forms are made of the same parts and are not run by themselves.
#pragma once

#include "../gpu/plan.h"

namespace quantization_mlx::metal {

// What plans of a problem are made for, on the GPU that torch runs on: without the families known to fail.
gpu::Target current_target(const MatmulProblem& problem);
gpu::Target current_target(const GatherProblem& problem);
gpu::Target current_target(const DequantizeProblem& problem);
gpu::Target current_target(const QuantizeProblem& problem);

// A plan whose kernels have passed. Warns once of each family that fails, and goes on to the next; raises RuntimeError
// where none is left and, in a CI run (the environment variable CI is "true"), where any fails. For any thread.
gpu::Plan checked_plan(const MatmulProblem& problem);
gpu::Plan checked_plan(const GatherProblem& problem);
gpu::Plan checked_plan(const DequantizeProblem& problem);
gpu::Plan checked_plan(const QuantizeProblem& problem);

}  // namespace quantization_mlx::metal
