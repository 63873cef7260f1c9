#include <c10/core/ScalarType.h>

#include <utility>

#include "../plan.h"

namespace quantization_mlx::gpu {
namespace {

void promote(Matrices& matrices, at::ScalarType dtype) {
  matrices.tensor = matrices.tensor.to(dtype).contiguous();
  matrices.matrix_stride = matrices.count > 1 ? matrices.row_stride * matrices.tensor.size(-2) : 0;
}

void promote_scales(QuantizedMatrices& weights, at::ScalarType dtype) {
  if (has_biases(weights.format.mode) && weights.scales.tensor.scalar_type() != dtype) {
    promote(weights.scales, dtype);
    promote(weights.biases, dtype);
  }
}

}  // namespace

MatmulProblem with_kernel_dtype(MatmulProblem problem) {
  promote_scales(problem.weights, problem.dtype);
  return problem;
}

GatedMatmulProblem with_kernel_dtype(GatedMatmulProblem problem) {
  promote_scales(problem.matmul.weights, problem.matmul.dtype);
  return problem;
}

GatherProblem with_kernel_dtype(GatherProblem problem) {
  promote_scales(problem.matmul.weights, problem.matmul.dtype);
  return problem;
}

DequantizeProblem with_kernel_dtype(DequantizeProblem problem) {
  if (has_biases(problem.weights.format.mode)) {
    problem.dtype = c10::promoteTypes(problem.weights.scales.tensor.scalar_type(), problem.dtype);
    promote_scales(problem.weights, problem.dtype);
  }
  return problem;
}

}  // namespace quantization_mlx::gpu
