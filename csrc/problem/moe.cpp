// Mixtures of experts: moe_router and moe_combine.
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "../gpu/launch.h"
#include "fast.h"
#include "weights.h"

namespace quantization_mlx {
namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- moe_router -----------------------------------------------------------------------------------------------------

using Scoring = RouterProblem::Scoring;

constexpr std::pair<std::string_view, Scoring> scorings[] = {
    {"softmax", Scoring::softmax},
    {"sigmoid", Scoring::sigmoid},
    {"softmax_of_selected", Scoring::softmax_of_selected}};

struct RouterArguments {
  const Tensor& logits;
  int64_t k;
  std::string_view scoring;
  const OptionalTensor& bias;
  int64_t groups;
  int64_t groups_used;
};

Scoring scoring_of(std::string_view name) {
  const auto* found =
      std::find_if(std::begin(scorings), std::end(scorings), [&](const auto& row) { return row.first == name; });
  TORCH_CHECK_VALUE(
      found != std::end(scorings), "[", RouterProblem::name, "] scoring is \"", name,
      "\"; supported are \"softmax\", \"sigmoid\" and \"softmax_of_selected\".");
  return found->second;
}

// The experts' number decides which kernel runs: it is a plain one while tracing, too.
int64_t check_router(const RouterArguments& arguments) {
  constexpr const char* op = RouterProblem::name;
  const auto& [logits, k, scoring, bias, groups, groups_used] = arguments;
  check_activation(op, "logits", logits);
  scoring_of(scoring);
  const auto sizes = logits.sym_sizes();
  TORCH_CHECK_VALUE(!sizes.empty(), "[", op, "] logits is a scalar; it needs at least one dimension.");
  const int64_t experts = sizes.back().guard_int(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(
      experts >= 1 && experts <= router_max_experts(), "[", op, "] logits of shape ", sizes, " has ", experts,
      " experts; there must be 1 to ", router_max_experts(), ".");
  TORCH_CHECK_VALUE(
      groups >= 1 && groups <= router_max_groups() && experts % groups == 0 && (groups == 1 || experts > groups), "[",
      op, "] groups is ", groups, " with ", experts, " experts; it must be 1 to ", router_max_groups(),
      " and divide them into groups of 2 or more.");
  TORCH_CHECK_VALUE(
      groups_used >= 1 && groups_used <= groups, "[", op, "] groups_used is ", groups_used, " of ", groups,
      " groups; it must be from 1 to that.");
  const int64_t left = experts / groups * groups_used;
  TORCH_CHECK_VALUE(
      k >= 1 && k <= std::min<int64_t>(left, router_max_selected()), "[", op, "] k is ", k, " of ", left,
      " experts to choose from; it must be from 1 to that, and at most ", router_max_selected(), ".");
  if (bias.has_value()) {
    check_activation(op, "bias", *bias);
    check_device(op, "bias", *bias, "logits", logits);
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && holds(bias->sym_size(0).sym_eq(experts)), "[", op, "] bias of shape ", bias->sym_sizes(),
        " must be one number for each of ", experts, " experts.");
  }
  return experts;
}

// --- moe_combine ----------------------------------------------------------------------------------------------------

struct CombineArguments {
  const Tensor& y;
  const Tensor& weights;
  const OptionalTensor& residual;
  const OptionalTensor& bias;
  const OptionalTensor& experts;
};

template <typename Int>
ScalarType check_combine(const CombineArguments& arguments) {
  const auto& [y, weights, residual, bias, experts] = arguments;
  constexpr const char* op = CombineProblem::name;
  check_activation(op, "y", y);
  check_activation(op, "weights", weights);
  check_device(op, "weights", weights, "y", y);
  const auto sizes = sizes_of<Int>(y);
  TORCH_CHECK_VALUE(
      sizes.size() >= 2 && holds(c10::sym_ge(sizes[sizes.size() - 2], Int(1))), "[", op, "] y of shape ", sizes,
      " must be [..., k, H], the results of k experts for a token, k at least 1.");
  TORCH_CHECK_VALUE(
      same_sizes(sizes_of<Int>(weights), sizes.slice(0, sizes.size() - 1)), "[", op, "] weights of shape ",
      sizes_of<Int>(weights), " must have the leading sizes of y, whose shape is ", sizes, ".");
  ScalarType dtype = y.scalar_type();
  if (residual.has_value()) {
    check_activation(op, "residual", *residual);
    check_device(op, "residual", *residual, "y", y);
    Sizes<Int> summed(sizes.begin(), sizes.end() - 2);
    summed.push_back(sizes.back());
    TORCH_CHECK_VALUE(
        same_sizes(sizes_of<Int>(*residual), c10::ArrayRef<Int>(summed)), "[", op, "] residual of shape ",
        sizes_of<Int>(*residual), " must have the sizes of y but for k, ", c10::ArrayRef<Int>(summed), ".");
    dtype = c10::promoteTypes(dtype, residual->scalar_type());
  }
  TORCH_CHECK_VALUE(bias.has_value() == experts.has_value(), "[", op, "] bias and experts must be given together.");
  if (bias.has_value()) {
    check_device(op, "experts", *experts, "y", y);
    check_expert_bias<Int>(op, "bias", *bias, *experts, sizes.slice(0, sizes.size() - 1), sizes.back(), dtype);
  }
  return dtype;
}

template <typename Int>
Sizes<Int> combined_sizes(const Tensor& y) {
  const auto sizes = sizes_of<Int>(y);
  Sizes<Int> result(sizes.begin(), sizes.end() - 2);
  result.push_back(sizes.back());
  return result;
}

}  // namespace

RouterProblem RouterProblem::check(
    const Tensor& logits,
    int64_t k,
    std::string_view scoring,
    const OptionalTensor& bias,
    int64_t groups,
    int64_t groups_used,
    bool normalise,
    double scale) {
  const int64_t experts = check_router({logits, k, scoring, bias, groups, groups_used});
  Sizes<int64_t> output(logits.sizes().begin(), logits.sizes().end());
  output.back() = k;
  return {
      vectors_of(logits, logits.scalar_type()),
      bias.has_value() ? with_dtype(*bias, at::kFloat).contiguous() : Tensor(),
      scoring_of(scoring),
      experts,
      k,
      groups,
      groups_used,
      normalise,
      static_cast<float>(scale),
      std::move(output)};
}

std::tuple<Tensor, Tensor> RouterProblem::meta(
    const Tensor& logits,
    int64_t k,
    std::string_view scoring,
    const OptionalTensor& bias,
    int64_t groups,
    int64_t groups_used,
    bool,
    double) {
  check_router({logits, k, scoring, bias, groups, groups_used});
  Sizes<c10::SymInt> sizes(logits.sym_sizes().begin(), logits.sym_sizes().end());
  sizes.back() = k;
  return {empty(sizes, logits.options().dtype(at::kLong)), empty(sizes, logits.options())};
}

std::tuple<Tensor, Tensor> empty_routed(const RouterProblem& problem) {
  const auto options = problem.logits.tensor.options();
  return {at::empty(problem.output, options.dtype(at::kLong)), at::empty(problem.output, options)};
}

CombineProblem CombineProblem::check(
    const Tensor& y,
    const Tensor& weights,
    const OptionalTensor& residual,
    const OptionalTensor& bias,
    const OptionalTensor& experts) {
  const ScalarType dtype = check_combine<int64_t>({y, weights, residual, bias, experts});
  const ScalarType weights_dtype = weights.scalar_type() == dtype ? dtype : at::kFloat;
  return {
      vectors_of(y, dtype),
      with_dtype(weights, weights_dtype).contiguous(),
      residual.has_value() ? vectors_of(*residual, dtype) : Vectors(),
      bias.has_value() ? vectors_of(*bias, dtype) : Vectors(),
      experts.has_value() ? experts->contiguous() : Tensor(),
      y.size(-2),
      y.size(-1),
      combined_sizes<int64_t>(y)};
}

Tensor CombineProblem::meta(
    const Tensor& y,
    const Tensor& weights,
    const OptionalTensor& residual,
    const OptionalTensor& bias,
    const OptionalTensor& experts) {
  const ScalarType dtype = check_combine<c10::SymInt>({y, weights, residual, bias, experts});
  return empty(combined_sizes<c10::SymInt>(y), y.options().dtype(dtype));
}

}  // namespace quantization_mlx
