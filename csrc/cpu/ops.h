// The ops on CPU: checked problems in, tensors out.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>
#include <tuple>

#include "../problem/fast.h"
#include "../problem/image.h"
#include "../problem/problem.h"
#include "kernels.h"

namespace quantization_mlx::cpu {

// What kernels call a floating-point dtype of this package.
Real real_of(at::ScalarType dtype);

at::Tensor run(const MatmulProblem& problem);

at::Tensor run(const GatherProblem& problem);

at::Tensor run(const DequantizeProblem& problem);

std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const QuantizeProblem& problem);

at::Tensor run(const NormProblem& problem);

// The sum and its norm.
std::tuple<at::Tensor, at::Tensor> run(const AddRmsNormProblem& problem);

// The queries; keys and values are in their caches.
at::Tensor run(const RopeIntoCacheProblem& problem);

at::Tensor run(const SampleProblem& problem);

std::tuple<at::Tensor, at::Tensor> run(const RouterProblem& problem);

at::Tensor run(const CombineProblem& problem);

at::Tensor run(const AttentionProblem& problem);

at::Tensor run(const RopeProblem& problem);

at::Tensor run(const GateProblem& problem);

at::Tensor run(const GatedMatmulProblem& problem);

at::Tensor run(const ImageProblem& problem);

// What a product multiplies: the activations that it is given, or those quantized to int8 group by group.
enum class Activations : uint8_t { exact, int8 };

// That of the process: "exact" or "int8", at first what the environment variable QUANTIZATION_MLX_CPU_ACTIVATIONS says.
// Raise ValueError for another name, and for "int8" without the instructions for it.
void set_activations(std::string_view name);
std::string get_activations();

// Those of one product: int8 serves transposed weights of affine and E2M1 modes.
Activations activations_of(const MatmulProblem& problem);

// While one lives, the products of its thread are exact.
class ExactActivations {
 public:
  ExactActivations();
  ~ExactActivations();
  ExactActivations(const ExactActivations&) = delete;
  ExactActivations& operator=(const ExactActivations&) = delete;
};

// What would run, as JSON: {"device": "cpu", "instruction_set": ...}, for products with "activations".
std::string describe(const MatmulProblem& problem);
std::string describe(const GatherProblem& problem);
std::string describe(const QuantizeProblem& problem);
std::string describe(const DequantizeProblem& problem);
std::string describe(const NormProblem& problem);
std::string describe(const RopeIntoCacheProblem& problem);
std::string describe(const SampleProblem& problem);
std::string describe(const RouterProblem& problem);
std::string describe(const CombineProblem& problem);
std::string describe(const AttentionProblem& problem);
std::string describe(const RopeProblem& problem);
std::string describe(const GateProblem& problem);
std::string describe(const GatedMatmulProblem& problem);
std::string describe(const ImageProblem& problem);

}  // namespace quantization_mlx::cpu
