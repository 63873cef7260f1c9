// Gradients of attention, of torch's own ops in float32 on the weights of the softmax, made again.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "autograd.h"
#include "gradients.h"

namespace quantization_mlx::autograd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

constexpr double hidden = -std::numeric_limits<double>::infinity();

// The heads of queries by the head of keys that they share: [batch, key heads, group, ...].
Tensor grouped(const Tensor& tensor, const c10::SymInt& key_heads) {
  c10::SmallVector<c10::SymInt, 6> sizes(tensor.sym_sizes().begin(), tensor.sym_sizes().end());
  sizes[1] = sizes[1] / key_heads;
  sizes.insert(sizes.begin() + 1, key_heads);
  return tensor.reshape_symint(sizes);
}

Tensor ungrouped(const Tensor& tensor) { return tensor.flatten(1, 2); }

// Which keys [queries, keys] a causal mask shows.
Tensor visible_keys(
    const c10::SymInt& queries,
    const c10::SymInt& keys,
    std::optional<int64_t> window,
    at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  const Tensor own = (at::arange(queries, options) + (keys - queries)).unsqueeze(1);
  const Tensor key = at::arange(keys, options);
  const Tensor visible = key <= own;
  return window.has_value() ? visible.logical_and(key > own - *window) : visible;
}

struct Saved {
  Tensor q;  // [batch, key heads, group, queries, dim], in float32
  Tensor k;  // [batch, key heads, 1, keys, dim]
  Tensor v;
  Tensor mask;  // [batch, query heads, queries, keys], or what broadcasts to that
  Tensor sinks;
  double scale;
  bool causal;
  std::optional<int64_t> window;
  std::optional<double> softcap;

  c10::SymInt key_heads() const { return k.sym_size(1); }

  Tensor products() const { return at::matmul(q, k.mT()) * scale; }

  // Of the products; hidden where a key is not seen.
  Tensor scores(Tensor scores) const {
    if (softcap.has_value()) {
      scores = at::tanh(scores / *softcap) * *softcap;
    }
    if (mask.defined()) {
      const Tensor all = ungrouped(scores);
      scores = grouped(
          mask.scalar_type() == at::kBool ? all.masked_fill(mask.logical_not(), hidden) : all + mask, key_heads());
    }
    return causal
        ? scores.masked_fill(visible_keys(q.sym_size(3), k.sym_size(3), window, q.device()).logical_not(), hidden)
        : scores;
  }

  // [1, key heads, group, 1, 1]
  Tensor grouped_sinks() const {
    return grouped(sinks.unsqueeze(0), key_heads()).unsqueeze(-1).unsqueeze(-1).to(at::kFloat);
  }
};

// y = w v with weights w = exp(s - l), s the scores and l the logarithm of the sum of their exponentials, and that of a
// sink. With d = sum(gradient * y): the gradient of s is w * (gradient v^T - d), and that of a sink -exp(sink - l) * d.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static Tensor forward(
      AutogradContext* context,
      const Tensor& q,
      const Tensor& k,
      const Tensor& v,
      double scale,
      const OptionalTensor& mask,
      bool causal,
      const OptionalTensor& sinks,
      std::optional<int64_t> window,
      std::optional<double> softcap) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({q, k, v, mask.value_or(Tensor()), sinks.value_or(Tensor())});
    context->saved_data["scale"] = scale;
    context->saved_data["causal"] = causal;
    context->saved_data["window"] = window;
    context->saved_data["softcap"] = softcap;
    return ops::scaled_dot_product_attention(q, k, v, scale, mask, causal, sinks, window, softcap);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto given = context->get_saved_variables();
    const c10::SymInt key_heads = given[1].sym_size(1);
    const Saved saved{
        grouped(given[0].to(at::kFloat), key_heads),
        given[1].to(at::kFloat).unsqueeze(2),
        given[2].to(at::kFloat).unsqueeze(2),
        given[3],
        given[4],
        context->saved_data["scale"].toDouble(),
        context->saved_data["causal"].toBool(),
        context->saved_data["window"].toOptional<int64_t>(),
        context->saved_data["softcap"].toOptional<double>()};
    const Tensor gradient = grouped(gradients.front().to(at::kFloat), key_heads);
    const Tensor products = saved.products();
    const Tensor scores = saved.scores(products);
    Tensor logarithm = scores.logsumexp(-1, /*keepdim=*/true);
    if (saved.sinks.defined()) {
      logarithm = at::logaddexp(logarithm, saved.grouped_sinks());
    }
    const Tensor sees_nothing = logarithm == hidden;
    logarithm = logarithm.masked_fill(sees_nothing, 0.0);
    const Tensor weights = (scores - logarithm).exp();
    const Tensor of_weights = at::matmul(gradient, saved.v.mT());
    const Tensor share = (weights * of_weights).sum(-1, /*keepdim=*/true);
    const Tensor of_scores = weights * (of_weights - share);
    Tensor of_products = of_scores;
    if (saved.softcap.has_value()) {
      const Tensor tangents = at::tanh(products / *saved.softcap);
      of_products = of_scores * (1.0 - tangents * tangents);
    }

    // Of the arguments that are there: the others are no variables of the function.
    size_t variable = 0;
    const auto wants = [&](bool is_given) { return is_given && context->needs_input_grad(variable++); };
    variable_list result(9);
    if (wants(true)) {
      result[0] = (ungrouped(at::matmul(of_products, saved.k)) * saved.scale).to(given[0].scalar_type());
    }
    if (wants(true)) {
      result[1] = (at::matmul(of_products.mT(), saved.q).sum(2) * saved.scale).to(given[1].scalar_type());
    }
    if (wants(true)) {
      result[2] = at::matmul(weights.mT(), gradient).sum(2).to(given[2].scalar_type());
    }
    if (wants(saved.mask.defined())) {
      result[4] = at::sum_to(ungrouped(of_scores), given[3].sym_sizes()).to(given[3].scalar_type());
    }
    if (wants(saved.sinks.defined())) {
      const Tensor of_sinks = -(saved.grouped_sinks() - logarithm).exp() * share;
      result[6] = ungrouped(of_sinks).sum(c10::IntArrayRef{0, 2, 3}).to(given[4].scalar_type());
    }
    return result;
  }
};

}  // namespace

Tensor scaled_dot_product_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    double scale,
    const OptionalTensor& mask,
    bool causal,
    const OptionalTensor& sinks,
    std::optional<int64_t> window,
    std::optional<double> softcap) {
  refuse_tangents(AttentionProblem::name, {&q, &k, &v, pointer(mask), pointer(sinks)});
  if (at::GradMode::is_enabled() &&
      (wants_gradient(q) || wants_gradient(k) || wants_gradient(v) || wants_gradient(mask) || wants_gradient(sinks))) {
    return AttentionFunction::apply(q, k, v, scale, mask, causal, sinks, window, softcap);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::scaled_dot_product_attention(q, k, v, scale, mask, causal, sinks, window, softcap);
}

// With gradients, the attention to what the packed keys and values stand for.
Tensor quantized_scaled_dot_product_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& k_scales,
    const Tensor& k_biases,
    const Tensor& v,
    const Tensor& v_scales,
    const Tensor& v_biases,
    double scale,
    const OptionalTensor& mask,
    bool causal,
    const OptionalTensor& sinks,
    std::optional<int64_t> window,
    int64_t group_size,
    int64_t bits) {
  const std::initializer_list<const Tensor*> inputs{&q,        &k_scales,     &k_biases,     &v_scales,
                                                    &v_biases, pointer(mask), pointer(sinks)};
  refuse_tangents(QuantizedAttentionProblem::name, inputs);
  const bool wants = std::any_of(
      inputs.begin(), inputs.end(), [](const Tensor* input) { return input->defined() && wants_gradient(*input); });
  const auto attend = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::quantized_scaled_dot_product_attention(
        q, k, k_scales, k_biases, v, v_scales, v_biases, scale, mask, causal, sinks, window, group_size, bits);
  };
  if (!at::GradMode::is_enabled() || !wants) {
    return attend();
  }
  const auto dtype =
      QuantizedAttentionProblem::meta(
          q, k, k_scales, k_biases, v, v_scales, v_biases, scale, mask, causal, sinks, window, group_size, bits)
          .scalar_type();
  const auto unpacked = [&](const Tensor& words, const Tensor& scales, const Tensor& biases) {
    return ops::dequantize(words, scales, biases, group_size, bits, "affine", std::nullopt, dtype);
  };
  return ops::scaled_dot_product_attention(
      q, unpacked(k, k_scales, k_biases), unpacked(v, v_scales, v_biases), scale, mask, causal, sinks, window,
      std::nullopt);
}

}  // namespace quantization_mlx::autograd
