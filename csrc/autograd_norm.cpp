// Gradients of the norms, of torch's own ops in float32.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "autograd.h"
#include "gradients.h"

namespace quantization_mlx::autograd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

Tensor row_mean(const Tensor& tensor) { return tensor.mean(-1, /*keepdim=*/true); }

Tensor like(const Tensor& gradient, const Tensor& input) {
  return at::sum_to(gradient, input.sym_sizes()).to(input.scalar_type());
}

// y = n * weight + bias, where n = d * r, d = x or x - mean(x), r = 1 / sqrt(mean(d^2) + eps). With g = gradient *
// weight, the gradient of x is r * (g - n * mean(g * n)), less its own mean where that of x is subtracted.
struct Norm : torch::autograd::Function<Norm> {
  // The result is y, or the sum and y.
  static variable_list forward(
      AutogradContext* context,
      const Tensor& x,
      const OptionalTensor& residual,
      const OptionalTensor& weight,
      const OptionalTensor& bias,
      double eps,
      bool centres) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list results;
    if (centres) {
      results = {ops::layer_norm(x, weight, bias, eps)};
    } else if (residual.has_value()) {
      auto [sum, y] = ops::add_rms_norm(x, *residual, weight, eps, std::nullopt, 1.0);
      results = {std::move(sum), std::move(y)};
    } else {
      results = {ops::rms_norm(x, weight, eps)};
    }
    context->save_for_backward(
        {residual.has_value() ? results.front() : x, weight.value_or(Tensor()), bias.value_or(Tensor())});
    context->saved_data["eps"] = eps;
    context->saved_data["centres"] = centres;
    context->saved_data["x_dtype"] = x.scalar_type();
    if (residual.has_value()) {
      context->saved_data["residual_dtype"] = residual->scalar_type();
    }
    return results;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const auto& [weight, bias] = std::tie(saved[1], saved[2]);
    const bool centres = context->saved_data["centres"].toBool();
    const Tensor x = saved[0].to(at::kFloat);
    const Tensor gradient = gradients.back().to(at::kFloat);
    Tensor deviation = x;
    for (int i = 0; i < (centres ? 2 : 0); ++i) {  // twice, as the kernels do: the mean is rounded
      deviation = deviation - row_mean(deviation);
    }
    const Tensor factor = (row_mean(deviation * deviation) + context->saved_data["eps"].toDouble()).rsqrt();
    const Tensor normal = deviation * factor;
    const bool adds = gradients.size() > 1;
    // Of the arguments that are there: the others are no variables of the function.
    size_t variable = 0;
    const auto wants = [&](bool is_given) { return is_given && context->needs_input_grad(variable++); };
    const bool wants_x = wants(true);
    const bool wants_residual = wants(adds);
    const bool wants_weight = wants(weight.defined());
    const bool wants_bias = wants(bias.defined());
    variable_list result(6);
    if (wants_x || wants_residual) {
      const Tensor g = weight.defined() ? gradient * weight.to(at::kFloat) : gradient;
      Tensor x_gradient = (g - normal * row_mean(g * normal)) * factor;
      if (centres) {
        x_gradient = x_gradient - row_mean(x_gradient);
      }
      if (adds) {
        x_gradient = x_gradient + gradients.front().to(at::kFloat);
      }
      result[0] = x_gradient.to(context->saved_data["x_dtype"].toScalarType());
      if (adds) {
        result[1] = x_gradient.to(context->saved_data["residual_dtype"].toScalarType());
      }
    }
    if (wants_weight) {
      result[2] = like(gradient * normal, weight);
    }
    if (wants_bias) {
      result[3] = like(gradient, bias);
    }
    return result;
  }
};

bool records(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias) {
  return at::GradMode::is_enabled() &&
      (wants_gradient(x) || wants_gradient(residual) || wants_gradient(weight) || wants_gradient(bias));
}

}  // namespace

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
  refuse_tangents("rms_norm", {&x, pointer(weight)});
  if (records(x, x, weight, std::nullopt)) {
    return Norm::apply(x, OptionalTensor(), weight, OptionalTensor(), eps, /*centres=*/false)[0];
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::rms_norm(x, weight, eps);
}

Tensor layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  refuse_tangents("layer_norm", {&x, pointer(weight), pointer(bias)});
  if (records(x, x, weight, bias)) {
    return Norm::apply(x, OptionalTensor(), weight, bias, eps, /*centres=*/true)[0];
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::layer_norm(x, weight, bias, eps);
}

std::tuple<Tensor, Tensor> add_rms_norm(
    const Tensor& x,
    const Tensor& residual,
    const OptionalTensor& weight,
    double eps,
    const OptionalTensor& x_weight,
    double scale) {
  refuse_tangents("add_rms_norm", {&x, &residual, pointer(weight), pointer(x_weight)});
  if (records(x, residual, weight, x_weight)) {
    if (x_weight.has_value() || scale != 1.0) {
      AddRmsNormProblem::meta(x, residual, weight, eps, x_weight, scale);  // its errors
      const Tensor normal = x_weight.has_value() ? ops::rms_norm(x, x_weight, eps) : x;
      return ops::add_rms_norm(normal * scale, residual, weight, eps, std::nullopt, 1.0);
    }
    const auto results = Norm::apply(x, OptionalTensor(residual), weight, OptionalTensor(), eps, /*centres=*/false);
    return {results[0], results[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::add_rms_norm(x, residual, weight, eps, x_weight, scale);
}

}  // namespace quantization_mlx::autograd
