// From a plan to commands on torch's MPS stream. Nothing is decided here.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "library.h"

namespace quantization_mlx::metal {

// Tensors by Role; null, or undefined, where no launch of the plan names them. partial_sums is made by encode.
class Operands {
 public:
  const at::Tensor*& operator[](gpu::Role role) { return tensors_[static_cast<size_t>(role)]; }
  const at::Tensor* operator[](gpu::Role role) const { return tensors_[static_cast<size_t>(role)]; }

 private:
  std::array<const at::Tensor*, gpu::role_count> tensors_{};
};

// Returns when the commands are encoded: they run in the stream's order, after what was given to it before.
void encode(const PreparedPlan& plan, Operands operands);

}  // namespace quantization_mlx::metal
