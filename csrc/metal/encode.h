// From a plan to commands on torch's MPS stream. Nothing is decided here.
#pragma once

#include "library.h"
#include "operands.h"

namespace quantization_mlx::metal {

// Returns when the commands are encoded: they run in the stream's order, after what was given to it before.
void encode(const PreparedPlan& plan, Operands operands);

}  // namespace quantization_mlx::metal
