// The product of few tokens and a router, for which float32 copies of the router would take longer than the product.
#pragma once

#include <ATen/core/Tensor.h>

namespace quantization_mlx::cpu {

// Whether x [tokens, K] and router [K, experts] are so few rows, the router in half precision and contiguous.
bool multiplies_without_copies(const at::Tensor& x, const at::Tensor& router);

// x @ router in float32. The bits of a result do not depend on the number of threads.
at::Tensor product_without_copies(const at::Tensor& x, const at::Tensor& router);

}  // namespace quantization_mlx::cpu
