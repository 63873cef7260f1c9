// Examples of the ops between products.
#include "../ops.h"
#include "self_check_examples.h"

namespace quantization_mlx::metal {

using at::Tensor;
using namespace gpu;
using OptionalTensor = std::optional<Tensor>;

// Rows that keep all threads busy, and one that ends in the middle of a thread's elements where the kernel takes such.
Reason failure(const NormFacts& facts, const Launch& launch, const Target& target) {
  constexpr int64_t rows = 3;
  constexpr double epsilon = 0.01;
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const int64_t at_once = int64_t{launch.kernel.threads} * norm_elements();
  const int64_t steps = facts.length > at_once ? 2 : 1;
  const int64_t length = steps * at_once - (is_set(launch.kernel, QUANTIZATION_MLX_ALIGNED_X) ? 0 : 3);
  Maker make{at::Device(at::kCPU)};
  const auto parameter = [&](bool is_given) {
    return is_given ? OptionalTensor(make.uniform({length}, dtype, 0.5f, 1.5f)) : std::nullopt;
  };
  const Tensor x = make.uniform({rows, length}, dtype, -1.0f, 2.0f);
  const Tensor residual = facts.has_residual ? make.uniform({rows, length}, dtype, -1.0f, 1.0f) : Tensor();
  const OptionalTensor weight = parameter(facts.has_weight);
  const OptionalTensor bias = parameter(facts.has_bias);
  const bool centres = facts.kind == static_cast<int32_t>(NormProblem::Kind::layer);
  const Tensor sum = residual.defined() ? x.add(residual) : x;
  const Tensor expected = centres ? ops::layer_norm(x, weight, bias, epsilon) : ops::rms_norm(sum, weight, epsilon);

  const auto problem_on_mps = [&]() -> NormProblem {
    if (centres) {
      return LayerNormProblem::check(x.to(mps), on_mps(weight), on_mps(bias), epsilon);
    }
    return residual.defined()
        ? NormProblem(AddRmsNormProblem::check(x.to(mps), residual.to(mps), on_mps(weight), epsilon))
        : NormProblem(RmsNormProblem::check(x.to(mps), on_mps(weight), epsilon));
  };
  const NormProblem problem = problem_on_mps();
  const Tensor y = at::empty(problem.output, problem.x.tensor.options());
  const Tensor our_sum = at::empty(problem.output, problem.x.tensor.options());
  run(gpu::plan(problem, target), operands_of(problem, y, our_sum));
  const Reason reason = residual.defined() ? judged(our_sum, sum, dtype) : std::nullopt;
  return reason.has_value() ? reason : judged(y, expected, dtype);
}

}  // namespace quantization_mlx::metal
