// The tensors of a call, by the parts that they play in its launches.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "../gpu/plan.h"
#include "../problem/fast.h"
#include "../problem/image.h"
#include "../problem/problem.h"

namespace quantization_mlx::metal {

// Tensors by Role; null, or undefined, where no launch of the plan names them. The workspace is made by encode.
class Operands {
 public:
  const at::Tensor*& operator[](gpu::Role role) { return tensors_[static_cast<size_t>(role)]; }
  const at::Tensor* operator[](gpu::Role role) const { return tensors_[static_cast<size_t>(role)]; }

  CallNumbers numbers{};  // the value of that role

 private:
  std::array<const at::Tensor*, gpu::role_count> tensors_{};
};

// Those of a problem with_kernel_dtype and of its results, which must outlive them.
Operands operands_of(const MatmulProblem& problem, const at::Tensor& y);
Operands operands_of(const GatherProblem& problem, const at::Tensor& y);
Operands operands_of(const GatedMatmulProblem& problem, const at::Tensor& y);
Operands operands_of(const DequantizeProblem& problem, const at::Tensor& y);
Operands operands_of(const QuantizeProblem& problem, const std::tuple<at::Tensor, at::Tensor, at::Tensor>& results);
// sum: undefined where nothing is added.
Operands operands_of(const NormProblem& problem, const at::Tensor& y, const at::Tensor& sum);
Operands operands_of(const RopeIntoCacheProblem& problem, const at::Tensor& queries);
Operands operands_of(const SampleProblem& problem, const at::Tensor& tokens);
Operands operands_of(const RouterProblem& problem, const std::tuple<at::Tensor, at::Tensor>& results);
Operands operands_of(const CombineProblem& problem, const at::Tensor& y);
Operands operands_of(const AttentionProblem& problem, const at::Tensor& y);
Operands operands_of(const RopeProblem& problem, const at::Tensor& y);
Operands operands_of(const GateProblem& problem, const at::Tensor& y);
Operands operands_of(const ImageProblem& problem, const at::Tensor& y);

}  // namespace quantization_mlx::metal
