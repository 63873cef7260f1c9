// Gradients of the products with respect to x and, in affine mode, to scales and biases, as in MLX; of dequantize with
// respect to scales and biases. The packed codes have none, and quantize is a constant to its input's gradient. Of the
// norms, of attention and of moe_combine, with respect to all their tensors; of moe_router's weights, with respect to
// logits. A sampled token has none.
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
decltype(SampleProblem::meta) sample;
decltype(RouterProblem::meta) moe_router;
decltype(CombineProblem::meta) moe_combine;
decltype(AttentionProblem::meta) scaled_dot_product_attention;

}  // namespace quantization_mlx::autograd
