// Mixtures of experts that are one linear map each, made of the other ops on any device.
#pragma once

#include <torch/library.h>

namespace quantization_mlx {

// _router_logits: the product of tokens and a router, in float32 whatever their dtypes are.
// _linear_experts: from tokens to results in one call, since between ops of a single token the time that an interpreter
// takes shows. Both are for `marlin/moe_dispatch.py` alone, which says what does not fit by its documented name.
void define_linear_experts(torch::Library& library);
void implement_linear_experts(torch::Library& library);
void implement_linear_experts_cpu(torch::Library& library);
void implement_linear_experts_autograd(torch::Library& library);

}  // namespace quantization_mlx
