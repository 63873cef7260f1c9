// Gated activations: swiglu and geglu.
#include <c10/core/ScalarType.h>

#include <cmath>
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

GateProblem checked(std::string_view op, Gate kind, const Tensor& given_gates, const Tensor& given_values) {
  const ScalarType dtype = check_gates<int64_t>(op, given_gates, given_values);
  const Tensor gates = with_dtype(given_gates, dtype);
  const Tensor values = with_dtype(given_values, dtype);
  GateProblem problem{op, kind, {}, {}, 1.0, std::numeric_limits<double>::infinity(), 0.0, 1, gates.numel(), {}};
  problem.output = {gates.sizes().begin(), gates.sizes().end()};
  if (gates.is_contiguous() && values.is_contiguous()) {  // all of them are one row
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

Tensor empty_gated(std::string_view op, const Tensor& gates, const Tensor& values) {
  const ScalarType dtype = check_gates<c10::SymInt>(op, gates, values);
  return empty(gates.sym_sizes(), gates.options().dtype(dtype));
}

}  // namespace

SwigluProblem SwigluProblem::check(
    const Tensor& gates,
    const Tensor& values,
    double alpha,
    std::optional<double> limit,
    double offset) {
  SwigluProblem problem{checked(name, Gate::swiglu, gates, values)};
  problem.alpha = alpha;
  problem.limit = check_limit(limit);
  problem.offset = offset;
  return problem;
}

Tensor SwigluProblem::meta(const Tensor& gates, const Tensor& values, double, std::optional<double> limit, double) {
  check_limit(limit);
  return empty_gated(name, gates, values);
}

GegluProblem GegluProblem::check(const Tensor& gates, const Tensor& values, std::string_view approximate) {
  return {checked(name, kind_of(approximate), gates, values)};
}

Tensor GegluProblem::meta(const Tensor& gates, const Tensor& values, std::string_view approximate) {
  kind_of(approximate);
  return empty_gated(name, gates, values);
}

}  // namespace quantization_mlx
