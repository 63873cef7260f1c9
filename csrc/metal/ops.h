// The ops on an Apple GPU: checked problems in, tensors out.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "../problem/fast.h"
#include "../problem/image.h"
#include "../problem/problem.h"

namespace quantization_mlx::metal {

at::Tensor run(MatmulProblem problem);

// A row of the result whose pair has an index out of range is NaN. With the environment variable QUANTIZATION_MLX_DEBUG
// set, waits for the device and raises IndexError instead, as the CPU does.
at::Tensor run(GatherProblem problem);

at::Tensor run(DequantizeProblem problem);

std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const QuantizeProblem& problem);

at::Tensor run(const NormProblem& problem);

std::tuple<at::Tensor, at::Tensor> run(const AddRmsNormProblem& problem);

at::Tensor run(const RopeIntoCacheProblem& problem);

at::Tensor run(const RopeProblem& problem);

at::Tensor run(const GateProblem& problem);

at::Tensor run(GatedMatmulProblem problem);

// A row that the CPU would raise for has the token -1.
at::Tensor run(const SampleProblem& problem);

std::tuple<at::Tensor, at::Tensor> run(const RouterProblem& problem);

at::Tensor run(const CombineProblem& problem);

at::Tensor run(const AttentionProblem& problem);

at::Tensor run(const ImageProblem& problem);

}  // namespace quantization_mlx::metal
