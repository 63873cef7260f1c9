// Gradients of the products with respect to x and, in affine mode, to scales and biases, as in MLX; of dequantize with
// respect to scales and biases. The packed codes have none, and quantize is a constant to its input's gradient.
#pragma once

#include "ops.h"

namespace quantization_mlx::autograd {

decltype(MatmulProblem::meta) quantized_matmul;
decltype(GatherProblem::meta) gather_qmm;
decltype(DequantizeProblem::meta) dequantize;
decltype(QuantizeProblem::meta) quantize;

}  // namespace quantization_mlx::autograd
