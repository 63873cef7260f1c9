// Gradients of moe_router and moe_combine, of torch's own ops in float32.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "autograd.h"
#include "gradients.h"

namespace quantization_mlx::autograd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

Tensor sum_of_last(const Tensor& tensor) { return tensor.sum(-1, /*keepdim=*/true); }

// What a gradient of softmax's result s is to its input.
Tensor through_softmax(const Tensor& gradient, const Tensor& s) { return s * (gradient - sum_of_last(gradient * s)); }

// The numbers of a call.
struct Routing {
  int64_t k;
  std::string scoring;
  int64_t groups;
  int64_t groups_used;
  bool normalise;
  double scale;
};

struct Router : torch::autograd::Function<Router> {
  static variable_list forward(
      AutogradContext* context,
      const Tensor& logits,
      const OptionalTensor& bias,
      const Routing& routing) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [experts, weights] = ops::moe_router(
        logits, routing.k, routing.scoring, bias, routing.groups, routing.groups_used, routing.normalise,
        routing.scale);
    context->mark_non_differentiable({experts});
    context->save_for_backward({logits, experts});
    context->saved_data["scoring"] = routing.scoring;
    context->saved_data["normalise"] = routing.normalise;
    context->saved_data["scale"] = routing.scale;
    return {experts, weights};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const Tensor logits = saved[0].to(at::kFloat);
    const Tensor& experts = saved[1];
    const std::string scoring = context->saved_data["scoring"].toStringRef();
    const auto to_all = [&](const Tensor& selected) { return at::zeros_like(logits).scatter(-1, experts, selected); };
    const auto scores = [&] {
      return scoring == "softmax" ? logits.softmax(-1) : (scoring == "sigmoid" ? logits.sigmoid() : Tensor());
    };
    const Tensor all = scores();
    const Tensor selected = all.defined() ? all.gather(-1, experts) : logits.gather(-1, experts).softmax(-1);
    Tensor gradient = gradients[1].to(at::kFloat) * context->saved_data["scale"].toDouble();
    if (context->saved_data["normalise"].toBool()) {
      const Tensor sum = sum_of_last(selected) + static_cast<double>(router_epsilon());
      gradient = gradient / sum - sum_of_last(gradient * selected) / (sum * sum);
    }
    const auto of_logits = [&] {
      if (scoring == "softmax") {
        return through_softmax(to_all(gradient), all);
      }
      return to_all(
          scoring == "sigmoid" ? gradient * selected * (1.0 - selected) : through_softmax(gradient, selected));
    };
    return {of_logits().to(saved[0].scalar_type()), Tensor(), Tensor()};
  }
};

struct Combine : torch::autograd::Function<Combine> {
  static Tensor forward(
      AutogradContext* context,
      const Tensor& y,
      const Tensor& weights,
      const OptionalTensor& residual) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({y, weights});
    if (residual.has_value()) {
      context->saved_data["residual_dtype"] = residual->scalar_type();
    }
    return ops::moe_combine(y, weights, residual, std::nullopt, std::nullopt);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const auto& [y, weights] = std::tie(saved[0], saved[1]);
    const Tensor gradient = gradients[0].to(at::kFloat);
    variable_list result(3);
    if (context->needs_input_grad(0)) {
      result[0] = (gradient.unsqueeze(-2) * weights.to(at::kFloat).unsqueeze(-1)).to(y.scalar_type());
    }
    if (context->needs_input_grad(1)) {
      result[1] = y.to(at::kFloat).matmul(gradient.unsqueeze(-1)).squeeze(-1).to(weights.scalar_type());
    }
    if (context->saved_data.count("residual_dtype") > 0) {
      result[2] = gradient.to(context->saved_data["residual_dtype"].toScalarType());
    }
    return result;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> moe_router(
    const Tensor& logits,
    int64_t k,
    std::string_view scoring,
    const OptionalTensor& bias,
    int64_t groups,
    int64_t groups_used,
    bool normalise,
    double scale) {
  refuse_tangents(RouterProblem::name, {&logits});
  if (at::GradMode::is_enabled() && wants_gradient(logits)) {
    const auto results =
        Router::apply(logits, bias, Routing{k, std::string(scoring), groups, groups_used, normalise, scale});
    return {results[0], results[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::moe_router(logits, k, scoring, bias, groups, groups_used, normalise, scale);
}

Tensor moe_combine(
    const Tensor& y,
    const Tensor& weights,
    const OptionalTensor& residual,
    const OptionalTensor& bias,
    const OptionalTensor& experts) {
  refuse_tangents(CombineProblem::name, {&y, &weights, pointer(residual), pointer(bias)});
  const bool records = at::GradMode::is_enabled() &&
      (wants_gradient(y) || wants_gradient(weights) || wants_gradient(residual) || wants_gradient(bias));
  if (records && bias.has_value() && experts.has_value()) {
    CombineProblem::meta(y, weights, residual, bias, experts);  // its errors
    return moe_combine(plus_expert_bias(y, *bias, *experts), weights, residual, std::nullopt, std::nullopt);
  }
  if (records && !bias.has_value() && !experts.has_value()) {
    return Combine::apply(y, weights, residual);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::moe_combine(y, weights, residual, bias, experts);
}

}  // namespace quantization_mlx::autograd
