// Norms: rms_norm, layer_norm and add_rms_norm.
#include <ATen/ops/empty_like.h>
#include <c10/core/ScalarType.h>

#include "fast.h"
#include "weights.h"

namespace quantization_mlx {
namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Kind = NormProblem::Kind;

struct NormArguments {
  std::string_view op;
  Kind kind;
  const Tensor& x;
  const Tensor* residual;  // null where nothing is added
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double epsilon;
  const OptionalTensor& x_weight;
};

const OptionalTensor none;

// Also the result's dtype: the one that x, residual, x_weight and weight promote to, and with weight bias; as in MLX, a
// bias alone does not widen x.
template <typename Int>
ScalarType check_norm(const NormArguments& arguments) {
  const std::string_view op = arguments.op;
  const Tensor& x = arguments.x;
  const Tensor* residual = arguments.residual;
  check_activation(op, "x", x);
  const auto sizes = sizes_of<Int>(x);
  TORCH_CHECK_VALUE(!sizes.empty(), "[", op, "] x is a scalar; it needs at least one dimension.");
  ScalarType dtype = x.scalar_type();
  if (residual != nullptr) {
    check_activation(op, "residual", *residual);
    check_device(op, "residual", *residual, "x", x);
    TORCH_CHECK_VALUE(
        same_sizes(sizes_of<Int>(*residual), sizes), "[", op, "] residual of shape ", sizes_of<Int>(*residual),
        " must have the shape of x, ", sizes, ".");
    dtype = c10::promoteTypes(dtype, residual->scalar_type());
  }
  const auto check_parameter = [&](const char* name, const OptionalTensor& parameter, bool promotes) {
    if (parameter.has_value()) {
      check_activation(op, name, *parameter);
      check_device(op, name, *parameter, "x", x);
      TORCH_CHECK_VALUE(
          same_sizes(sizes_of<Int>(*parameter), sizes.slice(sizes.size() - 1)), "[", op, "] ", name, " of shape ",
          sizes_of<Int>(*parameter), " must have one dimension, of the last size of x, whose shape is ", sizes, ".");
      dtype = promotes ? c10::promoteTypes(dtype, parameter->scalar_type()) : dtype;
    }
  };
  check_parameter("x_weight", arguments.x_weight, true);
  const ScalarType sum_dtype = dtype;
  check_parameter("weight", arguments.weight, true);
  check_parameter("bias", arguments.bias, arguments.weight.has_value());
  TORCH_CHECK_TYPE(
      residual == nullptr || dtype == sum_dtype, "[", op, "] weight has dtype ", arguments.weight->scalar_type(),
      " and the sum of x and residual ", sum_dtype, ", which it would widen; it must have that dtype, too.");
  return dtype;
}

Tensor parameter_of(const OptionalTensor& given, ScalarType dtype) {
  return given.has_value() ? with_dtype(*given, dtype).contiguous() : Tensor();
}

NormProblem checked_norm(const NormArguments& arguments) {
  const ScalarType dtype = check_norm<int64_t>(arguments);
  const auto sizes = arguments.x.sizes();
  return {
      arguments.op,
      arguments.kind,
      vectors_of(arguments.x, dtype),
      arguments.residual != nullptr ? vectors_of(*arguments.residual, dtype) : Vectors(),
      parameter_of(arguments.weight, dtype),
      parameter_of(arguments.bias, dtype),
      arguments.epsilon,
      sizes.back(),
      {sizes.begin(), sizes.end()},
      parameter_of(arguments.x_weight, dtype)};
}

Tensor empty_norm(const NormArguments& arguments) {
  const ScalarType dtype = check_norm<c10::SymInt>(arguments);
  return empty(arguments.x.sym_sizes(), arguments.x.options().dtype(dtype));
}

NormArguments rms(const Tensor& x, const OptionalTensor& weight, double epsilon) {
  return {RmsNormProblem::name, Kind::rms, x, nullptr, weight, none, epsilon, none};
}

NormArguments layer(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double epsilon) {
  return {LayerNormProblem::name, Kind::layer, x, nullptr, weight, bias, epsilon, none};
}

NormArguments add_rms(
    const Tensor& x,
    const Tensor& residual,
    const OptionalTensor& weight,
    double epsilon,
    const OptionalTensor& x_weight) {
  return {AddRmsNormProblem::name, Kind::rms, x, &residual, weight, none, epsilon, x_weight};
}

}  // namespace

Vectors vectors_of(const Tensor& given, ScalarType dtype) {
  Tensor tensor = with_dtype(given, dtype);
  const int64_t length = tensor.size(-1);
  const int64_t count = product<int64_t>(tensor.sizes().slice(0, tensor.dim() - 1));
  const bool dense = tensor.stride(-1) == 1 || length <= 1;
  if (const auto stride = dense ? leading_stride(tensor, 1) : std::nullopt) {
    return {tensor, count, *stride};
  }
  return {tensor.contiguous(), count, length};
}

RmsNormProblem RmsNormProblem::check(const Tensor& x, const OptionalTensor& weight, double eps) {
  return {checked_norm(rms(x, weight, eps))};
}

Tensor RmsNormProblem::meta(const Tensor& x, const OptionalTensor& weight, double eps) {
  return empty_norm(rms(x, weight, eps));
}

LayerNormProblem LayerNormProblem::check(
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    double eps) {
  return {checked_norm(layer(x, weight, bias, eps))};
}

Tensor LayerNormProblem::meta(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  return empty_norm(layer(x, weight, bias, eps));
}

AddRmsNormProblem AddRmsNormProblem::check(
    const Tensor& x,
    const Tensor& residual,
    const OptionalTensor& weight,
    double eps,
    const OptionalTensor& x_weight,
    double scale) {
  AddRmsNormProblem problem{checked_norm(add_rms(x, residual, weight, eps, x_weight))};
  problem.scale = scale;
  return problem;
}

std::tuple<Tensor, Tensor> AddRmsNormProblem::meta(
    const Tensor& x,
    const Tensor& residual,
    const OptionalTensor& weight,
    double eps,
    const OptionalTensor& x_weight,
    double /*scale*/) {
  const Tensor sum = empty_norm(add_rms(x, residual, weight, eps, x_weight));
  return {sum, at::empty_like(sum)};
}

}  // namespace quantization_mlx
