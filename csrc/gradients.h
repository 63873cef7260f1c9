// What the gradients of all ops ask and refuse.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/index_select.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <initializer_list>
#include <optional>
#include <string_view>

namespace quantization_mlx::autograd {

inline bool wants_gradient(const at::Tensor& tensor) { return tensor.requires_grad(); }

inline bool wants_gradient(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->requires_grad();
}

inline const at::Tensor* pointer(const std::optional<at::Tensor>& tensor) {
  static const at::Tensor none;
  return tensor.has_value() ? &*tensor : &none;
}

// y [..., N] with the rows of bias [experts, N] that experts [...] name, in ops of torch that have gradients.
inline at::Tensor plus_expert_bias(const at::Tensor& y, const at::Tensor& bias, const at::Tensor& experts) {
  return y + at::index_select(bias, 0, experts.reshape({-1})).reshape_symint(y.sym_sizes());
}

// Without this a tangent would be dropped in silence.
inline void refuse_tangents(std::string_view op, std::initializer_list<const at::Tensor*> inputs) {
  for (const at::Tensor* input : inputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !torch::autograd::isFwGradDefined(*input), "[", op, "] forward-mode differentiation is not supported.");
  }
}

}  // namespace quantization_mlx::autograd
