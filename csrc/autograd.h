// Gradients of the products with respect to x and, in affine mode, to scales and biases, as in MLX; of dequantize with
// respect to scales and biases. The packed codes have none, and quantize is a constant to its input's gradient. Of
// norms and gated activations, with respect to all their tensors; of rope, with respect to x.
#pragma once

#include "ops.h"

namespace quantization_mlx::autograd {

decltype(MatmulProblem::meta) quantized_matmul;
decltype(GatherProblem::meta) gather_qmm;
decltype(DequantizeProblem::meta) dequantize;
decltype(QuantizeProblem::meta) quantize;
decltype(RmsNormProblem::meta) rms_norm;
decltype(LayerNormProblem::meta) layer_norm;
decltype(AddRmsNormProblem::meta) add_rms_norm;
decltype(RopeProblem::meta) rope;
decltype(SwigluProblem::meta) swiglu;
decltype(GegluProblem::meta) geglu;

}  // namespace quantization_mlx::autograd
