// Gradients of the gated activations, of torch's own ops in float32.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/sigmoid.h>
#include <torch/csrc/autograd/custom_function.h>

#include "autograd.h"
#include "gradients.h"

namespace quantization_mlx::autograd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

void save(AutogradContext* context, const Tensor& gates, const Tensor& values) {
  context->save_for_backward({gates, values});
  context->saved_data["gates_dtype"] = gates.scalar_type();
  context->saved_data["values_dtype"] = values.scalar_type();
}

// In the dtypes of gates and values; undefined where nobody asks.
variable_list wanted(AutogradContext* context, const Tensor& gates, const Tensor& values, size_t arguments) {
  variable_list result(arguments);
  const auto dtype = [&](const char* name) { return context->saved_data[name].toScalarType(); };
  result[0] = context->needs_input_grad(0) ? gates.to(dtype("gates_dtype")) : Tensor();
  result[1] = context->needs_input_grad(1) ? values.to(dtype("values_dtype")) : Tensor();
  return result;
}

// y = g * s * (v + offset), where s = sigmoid(alpha * g) and g and v are the operands within the limit, beyond which
// their gradients are zero: ds/dg = alpha * s * (1 - s).
struct Swiglu : torch::autograd::Function<Swiglu> {
  static Tensor forward(
      AutogradContext* context,
      const Tensor& gates,
      const Tensor& values,
      double alpha,
      std::optional<double> limit,
      double offset) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(context, gates, values);
    context->saved_data["alpha"] = alpha;
    context->saved_data["limit"] = limit;
    context->saved_data["offset"] = offset;
    return ops::swiglu(gates, values, alpha, limit, offset, std::nullopt, std::nullopt, std::nullopt);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const double alpha = context->saved_data["alpha"].toDouble();
    const auto limit = context->saved_data["limit"].toOptional<double>();
    const Tensor gradient = gradients[0].to(at::kFloat);
    Tensor gates = saved[0].to(at::kFloat);
    Tensor values = saved[1].to(at::kFloat);
    Tensor of_gates = gradient;
    Tensor of_values = gradient;
    if (limit.has_value()) {
      of_gates = of_gates * gates.le(*limit);
      of_values = of_values * values.abs().le(*limit);
      gates = at::clamp_max(gates, *limit);
      values = at::clamp(values, -*limit, *limit);
    }
    const Tensor sigmoid = at::sigmoid(gates * alpha);
    const Tensor slope = sigmoid * (1.0 + gates * alpha * (1.0 - sigmoid));
    return wanted(
        context, of_gates * slope * (values + context->saved_data["offset"].toDouble()), of_values * gates * sigmoid,
        5);
  }
};

struct Geglu : torch::autograd::Function<Geglu> {
  static Tensor forward(
      AutogradContext* context,
      const Tensor& gates,
      const Tensor& values,
      std::string_view approximate) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(context, gates, values);
    context->saved_data["approximate"] = std::string(approximate);
    return ops::geglu(gates, values, approximate);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const std::string& approximate = context->saved_data["approximate"].toStringRef();
    const Tensor gradient = gradients[0].to(at::kFloat);
    const Tensor gates = saved[0].to(at::kFloat);
    const Tensor values = saved[1].to(at::kFloat);
    return wanted(
        context, at::gelu_backward(gradient * values, gates, approximate), gradient * at::gelu(gates, approximate), 3);
  }
};

bool records(const Tensor& gates, const Tensor& values) {
  return at::GradMode::is_enabled() && (wants_gradient(gates) || wants_gradient(values));
}

}  // namespace

Tensor swiglu(
    const Tensor& gates,
    const Tensor& values,
    double alpha,
    std::optional<double> limit,
    double offset,
    const OptionalTensor& gate_bias,
    const OptionalTensor& value_bias,
    const OptionalTensor& experts) {
  refuse_tangents(SwigluProblem::name, {&gates, &values, pointer(gate_bias), pointer(value_bias)});
  const bool has_biases = gate_bias.has_value() && value_bias.has_value() && experts.has_value();
  const bool of_biases = has_biases && records(*gate_bias, *value_bias);
  if (has_biases && (of_biases || records(gates, values))) {
    SwigluProblem::meta(gates, values, alpha, limit, offset, gate_bias, value_bias, experts);  // its errors
    return swiglu(
        plus_expert_bias(gates, *gate_bias, *experts), plus_expert_bias(values, *value_bias, *experts), alpha, limit,
        offset, std::nullopt, std::nullopt, std::nullopt);
  }
  if (!has_biases && records(gates, values)) {
    return Swiglu::apply(gates, values, alpha, limit, offset);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::swiglu(gates, values, alpha, limit, offset, gate_bias, value_bias, experts);
}

Tensor geglu(const Tensor& gates, const Tensor& values, std::string_view approximate) {
  refuse_tangents(GegluProblem::name, {&gates, &values});
  if (records(gates, values)) {
    return Geglu::apply(gates, values, approximate);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::geglu(gates, values, approximate);
}

Tensor quantized_gated_matmul(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const OptionalTensor& biases,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    std::string_view activation,
    const OptionalTensor& global_scale) {
  refuse_tangents(GatedMatmulProblem::name, {&x, &scales, pointer(biases)});
  if (at::GradMode::is_enabled() && (wants_gradient(x) || wants_gradient(scales) || wants_gradient(biases))) {
    GatedMatmulProblem::meta(x, w, scales, biases, group_size, bits, mode, activation, global_scale);  // its errors
    const Tensor both = ops::quantized_matmul(
        x, w, scales, biases, /*transpose=*/true, group_size, bits, mode, global_scale, GatedMatmulProblem::name);
    const auto halves = both.chunk(2, -1);
    return ops::activated(halves[0], halves[1], activation);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::quantized_gated_matmul(x, w, scales, biases, group_size, bits, mode, activation, global_scale);
}

}  // namespace quantization_mlx::autograd
