// Gradients of the products with respect to x and, in affine mode, to scales and biases, as in MLX; of dequantize with
// respect to scales and biases. The packed codes have none, and quantize is a constant to its input's gradient.
#pragma once

#include "../torch-ext/torch_binding.h"

namespace quantization_mlx::autograd {

// The ops' own signatures.
decltype(ops::quantized_matmul) quantized_matmul;
decltype(ops::gather_qmm) gather_qmm;
decltype(ops::dequantize) dequantize;
decltype(ops::quantize) quantize;

}  // namespace quantization_mlx::autograd
