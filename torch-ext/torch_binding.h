// The op namespace of this build and typed access to the registered ops.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

// kernel-builder gives every build its own name, so that two builds can live in one process; the pip build names its
// ops quantization_mlx, so that exported programs can refer to them.
#ifndef QUANTIZATION_MLX_NAMESPACE
#define QUANTIZATION_MLX_NAMESPACE TORCH_EXTENSION_NAME
#endif

// The library macros paste their argument: one more level lets it expand first.
#define TORCH_LIBRARY_EXPAND(name, module) TORCH_LIBRARY(name, module)
#define TORCH_LIBRARY_IMPL_EXPAND(name, key, module) TORCH_LIBRARY_IMPL(name, key, module)
#define QUANTIZATION_MLX_STRING(name) #name
#define QUANTIZATION_MLX_STRING_EXPAND(name) QUANTIZATION_MLX_STRING(name)

namespace quantization_mlx::ops {

// Each goes through the dispatcher, so that autograd, tracing and devices apply.
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize(
    const at::Tensor& w,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<at::Tensor>& global_scale);

}  // namespace quantization_mlx::ops
