// The products under torch.autocast.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace quantization_mlx::autocast {

// For the ops that take x, w, scales and biases first: as torch casts the operands of a linear layer, casts x to
// autocast's dtype for its device and, in affine mode, scales and biases, too. The other modes' scales have a dtype of
// their own.
void product(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace quantization_mlx::autocast
