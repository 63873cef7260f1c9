// Gated activations: swiglu and geglu, and products that end in one.
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "fast.h"
#include "weights.h"

namespace quantization_mlx {
namespace {

using at::ScalarType;
using at::Tensor;

// Also the result's dtype.
template <typename Int>
ScalarType check_gates(std::string_view op, const Tensor& gates, const Tensor& values) {
  check_activation(op, "gates", gates);
  check_activation(op, "values", values);
  check_device(op, "values", values, "gates", gates);
  const auto sizes = sizes_of<Int>(gates);
  TORCH_CHECK_VALUE(
      same_sizes(sizes_of<Int>(values), sizes), "[", op, "] values of shape ", sizes_of<Int>(values),
      " must have the shape of gates, ", sizes, ".");
  return c10::promoteTypes(gates.scalar_type(), values.scalar_type());
}

// Of experts: given together or not at all.
struct Biases {
  std::optional<Tensor> gates;
  std::optional<Tensor> values;
  std::optional<Tensor> experts;
};

template <typename Int>
void check_biases(const Tensor& gates, const Biases& biases, ScalarType dtype) {
  constexpr const char* op = SwigluProblem::name;
  const bool is_given = biases.experts.has_value();
  TORCH_CHECK_VALUE(
      biases.gates.has_value() == is_given && biases.values.has_value() == is_given, "[", op,
      "] gate_bias, value_bias and experts must be given together.");
  if (!is_given) {
    return;
  }
  const auto sizes = sizes_of<Int>(gates);
  TORCH_CHECK_VALUE(!sizes.empty(), "[", op, "] gates are a scalar; with biases they must have a last dimension.");
  check_device(op, "experts", *biases.experts, "gates", gates);
  const auto leading = sizes.slice(0, sizes.size() - 1);
  check_expert_bias<Int>(op, "gate_bias", *biases.gates, *biases.experts, leading, sizes.back(), dtype);
  check_expert_bias<Int>(op, "value_bias", *biases.values, *biases.experts, leading, sizes.back(), dtype);
  TORCH_CHECK_VALUE(
      holds(c10::sym_eq(sizes_of<Int>(*biases.gates)[0], sizes_of<Int>(*biases.values)[0])), "[", op,
      "] gate_bias of shape ", sizes_of<Int>(*biases.gates), " and value_bias of shape ", sizes_of<Int>(*biases.values),
      " must be of as many experts.");
}

double check_limit(std::optional<double> limit) {
  const double value = limit.value_or(std::numeric_limits<double>::infinity());
  TORCH_CHECK_VALUE(value >= 0.0, "[", SwigluProblem::name, "] limit is ", value, "; it must not be negative.");
  return value;
}

Gate kind_of(std::string_view approximate) {
  TORCH_CHECK_VALUE(
      approximate == "none" || approximate == "tanh", "[", GegluProblem::name, "] approximate is \"", approximate,
      "\"; supported are \"none\" and \"tanh\".");
  return approximate == "tanh" ? Gate::geglu_tanh : Gate::geglu;
}

// Copies only what has gaps of several sizes between its rows.
StridedRows rows_of(const Tensor& tensor) {
  if (const auto stride = leading_stride(tensor, 1)) {
    return {tensor, *stride, tensor.stride(-1)};
  }
  return {tensor.contiguous(), tensor.size(-1), 1};
}

GateProblem checked(
    std::string_view op,
    Gate kind,
    const Tensor& given_gates,
    const Tensor& given_values,
    const Biases& biases) {
  const ScalarType dtype = check_gates<int64_t>(op, given_gates, given_values);
  check_biases<int64_t>(given_gates, biases, dtype);
  const Tensor gates = with_dtype(given_gates, dtype);
  const Tensor values = with_dtype(given_values, dtype);
  GateProblem problem{};
  problem.op = op;
  problem.kind = kind;
  problem.alpha = 1.0;
  problem.limit = std::numeric_limits<double>::infinity();
  problem.rows = 1;
  problem.length = gates.numel();
  problem.output = {gates.sizes().begin(), gates.sizes().end()};
  const bool has_biases = biases.experts.has_value();
  if (has_biases) {
    problem.gate_bias = rows_of(with_dtype(*biases.gates, dtype));
    problem.value_bias = rows_of(with_dtype(*biases.values, dtype));
    problem.experts = biases.experts->contiguous();
  }
  if (!has_biases && gates.is_contiguous() && values.is_contiguous()) {  // all of them are one row
    problem.gates = {gates};
    problem.values = {values};
  } else if (gates.numel() > 0) {
    problem.gates = rows_of(gates);
    problem.values = rows_of(values);
    problem.length = gates.size(-1);
    problem.rows = gates.numel() / problem.length;
  }
  return problem;
}

Gate kind_of_activation(std::string_view activation) {
  const auto* found = std::find(std::begin(activations), std::end(activations), activation);
  TORCH_CHECK_VALUE(
      found != std::end(activations), "[", GatedMatmulProblem::name, "] activation is \"", activation,
      "\"; supported are \"silu\", \"gelu\" and \"gelu_tanh\".");
  return static_cast<Gate>(found - std::begin(activations));
}

void check_halves(const c10::SymInt& rows) {
  TORCH_CHECK_VALUE(
      holds((rows % 2).sym_eq(0)), "[", GatedMatmulProblem::name, "] w has ", rows,
      " rows; there must be as many of gates as of values.");
}

Tensor empty_gated(std::string_view op, const Tensor& gates, const Tensor& values, const Biases& biases) {
  const ScalarType dtype = check_gates<c10::SymInt>(op, gates, values);
  check_biases<c10::SymInt>(gates, biases, dtype);
  return empty(gates.sym_sizes(), gates.options().dtype(dtype));
}

}  // namespace

SwigluProblem SwigluProblem::check(
    const Tensor& gates,
    const Tensor& values,
    double alpha,
    std::optional<double> limit,
    double offset,
    const std::optional<Tensor>& gate_bias,
    const std::optional<Tensor>& value_bias,
    const std::optional<Tensor>& experts) {
  SwigluProblem problem{checked(name, Gate::swiglu, gates, values, {gate_bias, value_bias, experts})};
  problem.alpha = alpha;
  problem.limit = check_limit(limit);
  problem.offset = offset;
  return problem;
}

Tensor SwigluProblem::meta(
    const Tensor& gates,
    const Tensor& values,
    double,
    std::optional<double> limit,
    double,
    const std::optional<Tensor>& gate_bias,
    const std::optional<Tensor>& value_bias,
    const std::optional<Tensor>& experts) {
  check_limit(limit);
  return empty_gated(name, gates, values, {gate_bias, value_bias, experts});
}

GegluProblem GegluProblem::check(const Tensor& gates, const Tensor& values, std::string_view approximate) {
  return {checked(name, kind_of(approximate), gates, values, {})};
}

Tensor GegluProblem::meta(const Tensor& gates, const Tensor& values, std::string_view approximate) {
  kind_of(approximate);
  return empty_gated(name, gates, values, {});
}

GatedMatmulProblem GatedMatmulProblem::check(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const std::optional<Tensor>& biases,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    std::string_view activation,
    const std::optional<Tensor>& global_scale) {
  const Gate kind = kind_of_activation(activation);
  GatedMatmulProblem problem{
      MatmulProblem::check(
          x, w, scales, biases, /*transpose=*/true, group_size, bits, mode, global_scale, GatedMatmulProblem::name),
      kind};
  check_halves(problem.matmul.shape.N);
  return problem;
}

Tensor GatedMatmulProblem::meta(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const std::optional<Tensor>& biases,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    std::string_view activation,
    const std::optional<Tensor>& global_scale) {
  kind_of_activation(activation);
  const Tensor both = MatmulProblem::meta(
      x, w, scales, biases, /*transpose=*/true, group_size, bits, mode, global_scale, GatedMatmulProblem::name);
  auto sizes = sizes_of<c10::SymInt>(both).vec();
  check_halves(sizes.back());
  sizes.back() = sizes.back() / 2;
  return empty(sizes, both.options());
}

Sizes<int64_t> GatedMatmulProblem::output() const {
  Sizes<int64_t> sizes = matmul.shape.output;
  sizes.back() = length();
  return sizes;
}

GateProblem GatedMatmulProblem::of_product(const Tensor& both) const {
  return checked(name, kind, both.narrow(-1, 0, length()), both.narrow(-1, length(), length()), {});
}

}  // namespace quantization_mlx
