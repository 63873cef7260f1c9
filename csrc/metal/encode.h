// From a plan to commands on torch's MPS stream. Nothing is decided here.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "../gpu/plan.h"

namespace quantization_mlx::metal {

// Tensors by Role; those that no launch of the plan names may be undefined. partial_sums is made by encode.
using Operands = std::array<at::Tensor, gpu::role_count>;

inline at::Tensor& operand(Operands& operands, gpu::Role role) { return operands[static_cast<size_t>(role)]; }
inline const at::Tensor& operand(const Operands& operands, gpu::Role role) {
  return operands[static_cast<size_t>(role)];
}

// Compiles what the plan needs and was not used before. Raises RuntimeError with the text of Metal's compiler.
void prepare(const gpu::Plan& plan);

// Returns when the commands are encoded: they run in the stream's order, after what was given to it before.
void encode(const gpu::Plan& plan, Operands operands);

}  // namespace quantization_mlx::metal
