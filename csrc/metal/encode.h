// From a plan to commands on torch's MPS stream. Nothing is decided here.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "library.h"

namespace quantization_mlx::metal {

// Tensors by Role; null, or undefined, where no launch of the plan names them. partial_sums is made by encode.
using Operands = std::array<const at::Tensor*, gpu::role_count>;

inline const at::Tensor*& operand(Operands& operands, gpu::Role role) { return operands[static_cast<size_t>(role)]; }

// Returns when the commands are encoded: they run in the stream's order, after what was given to it before.
void encode(const PreparedPlan& plan, Operands operands);

}  // namespace quantization_mlx::metal
