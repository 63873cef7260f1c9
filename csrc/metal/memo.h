// The plans of calls, kept by their facts: a second call with equal facts looks one up, and nothing is decided,
// compiled, checked or locked for it.
#pragma once

#include <string_view>

#include "../gpu/facts.h"
#include "library.h"

namespace quantization_mlx::metal {

// Facts: those of QUANTIZATION_MLX_FACTS. Valid until this thread asks for another one. Raises what checked_plan does.
template <typename Facts>
const PreparedPlan& plan_of(const Facts& facts, std::string_view op);

}  // namespace quantization_mlx::metal
