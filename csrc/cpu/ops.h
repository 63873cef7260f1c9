// The ops on CPU: checked problems in, tensors out.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

#include "../problem.h"

namespace quantization_mlx::cpu {

at::Tensor quantized_matmul(const MatmulProblem& problem);

at::Tensor gather_qmm(const GatherProblem& problem);

at::Tensor dequantize(const DequantizeProblem& problem);

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize(const QuantizeProblem& problem);

// The instruction set of the kernels, as JSON: {"device": "cpu", "instruction_set": ...}
std::string describe();

}  // namespace quantization_mlx::cpu
