#include "ops.h"

#include <ATen/ops/empty.h>
#include <string_view>

#include "../environment.h"
#include "encode.h"
#include "self_check.h"

namespace quantization_mlx::metal {
namespace {

using at::Tensor;
using namespace gpu;

Operands operands_of(const QuantizedMatrices& weights, const Tensor& y) {
  Operands operands;
  operand(operands, Role::w) = weights.words.tensor;
  operand(operands, Role::scales) = weights.scales.tensor;
  operand(operands, Role::biases) = weights.biases.tensor;
  operand(operands, Role::global_scale) = weights.global_scale;
  operand(operands, Role::y) = y;
  return operands;
}

Tensor empty_result(const MatmulProblem& problem) {
  return at::empty(problem.shape.output, problem.x.tensor.options().dtype(problem.dtype));
}

bool is_debugging() {
  const char* value = environment_variable("QUANTIZATION_MLX_DEBUG");
  return value != nullptr && std::string_view(value) != "0";
}

}  // namespace

Tensor run(const MatmulProblem& given) {
  Tensor y = empty_result(given);
  if (y.numel() > 0) {
    const MatmulProblem problem = with_kernel_dtype(given);
    Operands operands = operands_of(problem.weights, y);
    operand(operands, Role::x) = problem.x.tensor;
    encode(checked_plan(problem), std::move(operands));
  }
  return y;
}

Tensor run(const GatherProblem& given) {
  if (is_debugging()) {
    check_range(given.matmul.op, "lhs_indices", given.lhs_indices.cpu(), given.matmul.x.count);
    check_range(given.matmul.op, "rhs_indices", given.rhs_indices.cpu(), given.matmul.weights.words.count);
  }
  Tensor y = empty_result(given.matmul);
  if (y.numel() > 0) {
    const GatherProblem problem = with_kernel_dtype(given);
    Operands operands = operands_of(problem.matmul.weights, y);
    operand(operands, Role::x) = problem.matmul.x.tensor;
    operand(operands, Role::lhs_indices) = problem.lhs_indices;
    operand(operands, Role::rhs_indices) = problem.rhs_indices;
    encode(checked_plan(problem), std::move(operands));
  }
  return y;
}

Tensor run(const DequantizeProblem& given) {
  const DequantizeProblem problem = with_kernel_dtype(given);
  Tensor y = at::empty(problem.output, problem.weights.words.tensor.options().dtype(problem.dtype));
  if (y.numel() > 0) {
    encode(checked_plan(problem), operands_of(problem.weights, y));
  }
  return problem.dtype == given.dtype ? y : y.to(given.dtype);
}

std::tuple<Tensor, Tensor, Tensor> run(const QuantizeProblem& problem) {
  auto results = empty_quantized(problem);
  if (problem.w.numel() > 0) {
    Operands operands;
    operand(operands, Role::x) = problem.w;
    operand(operands, Role::global_scale) = problem.global_scale;
    operand(operands, Role::w) = std::get<0>(results);
    operand(operands, Role::scales) = std::get<1>(results);
    operand(operands, Role::biases) = std::get<2>(results);
    encode(checked_plan(problem), std::move(operands));
  }
  return results;
}

}  // namespace quantization_mlx::metal
