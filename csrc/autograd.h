// Gradients of the products with respect to x and, in affine mode, to scales and biases, as in MLX; of dequantize with
// respect to scales and biases. The packed codes have none.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace quantization_mlx::autograd {

at::Tensor quantized_matmul(
    const at::Tensor& x,
    const at::Tensor& w,
    const at::Tensor& scales,
    const std::optional<at::Tensor>& biases,
    bool transpose,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<at::Tensor>& global_scale,
    std::string_view op);

at::Tensor gather_qmm(
    const at::Tensor& x,
    const at::Tensor& w,
    const at::Tensor& scales,
    const std::optional<at::Tensor>& biases,
    const std::optional<at::Tensor>& lhs_indices,
    const std::optional<at::Tensor>& rhs_indices,
    bool transpose,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<at::Tensor>& global_scale,
    bool sorted_indices,
    std::string_view op);

at::Tensor dequantize(
    const at::Tensor& w,
    const at::Tensor& scales,
    const std::optional<at::Tensor>& biases,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<at::Tensor>& global_scale,
    std::optional<at::ScalarType> dtype);

}  // namespace quantization_mlx::autograd
