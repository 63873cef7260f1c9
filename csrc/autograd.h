// Gradients of the products with respect to x and, in affine mode, to scales and biases, as in MLX; of dequantize with
// respect to scales and biases. The packed codes have none, and quantize is a constant to its input's gradient. Of the
// ops between products, with respect to all their tensors, but of rope to x alone, and of moe_router's weights to its
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
decltype(QuantizedAttentionProblem::meta) quantized_scaled_dot_product_attention;
decltype(RopeProblem::meta) rope;
decltype(SwigluProblem::meta) swiglu;
decltype(GegluProblem::meta) geglu;
decltype(GatedMatmulProblem::meta) quantized_gated_matmul;

}  // namespace quantization_mlx::autograd
