#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <string_view>
#include <utility>

#include "../environment.h"
#include "encode.h"
#include "memo.h"

namespace quantization_mlx::metal {
namespace {

using at::Tensor;
using namespace gpu;

template <typename Problem>
void encode_problem(const Problem& problem, const Operands& operands) {
  for (const auto& facts : facts_of(problem)) {
    encode(plan_of(facts, op_of(problem)), operands);
  }
}

Tensor empty_result(const NormProblem& problem) { return at::empty(problem.output, problem.x.tensor.options()); }

Tensor empty_result(const MatmulProblem& problem) {
  return at::empty(problem.shape.output, problem.x.tensor.options().dtype(problem.dtype));
}

bool is_debugging() {
  static const bool set = [] {
    const char* value = environment_variable("QUANTIZATION_MLX_DEBUG");
    return value != nullptr && std::string_view(value) != "0";
  }();
  return set;
}

}  // namespace

Tensor run(MatmulProblem given) {
  const MatmulProblem problem = with_kernel_dtype(std::move(given));
  Tensor y = empty_result(problem);
  encode_problem(problem, operands_of(problem, y));
  return y;
}

Tensor run(GatherProblem given) {
  if (is_debugging()) {
    check_range(given.matmul.op, "lhs_indices", given.lhs_indices.cpu(), given.matmul.x.count);
    check_range(given.matmul.op, "rhs_indices", given.rhs_indices.cpu(), given.matmul.weights.words.count);
  }
  const GatherProblem problem = with_kernel_dtype(std::move(given));
  Tensor y = empty_result(problem.matmul);
  encode_problem(problem, operands_of(problem, y));
  return y;
}

Tensor run(DequantizeProblem given) {
  const at::ScalarType dtype = given.dtype;
  const DequantizeProblem problem = with_kernel_dtype(std::move(given));
  Tensor y = at::empty(problem.output, problem.weights.words.tensor.options().dtype(problem.dtype));
  encode_problem(problem, operands_of(problem, y));
  return problem.dtype == dtype ? y : y.to(dtype);
}

std::tuple<Tensor, Tensor, Tensor> run(const QuantizeProblem& problem) {
  auto results = empty_quantized(problem);
  encode_problem(problem, operands_of(problem, results));
  return results;
}

Tensor run(const NormProblem& problem) {
  const Tensor y = empty_result(problem);
  const Tensor none;
  encode_problem(problem, operands_of(problem, y, none));
  return y;
}

std::tuple<Tensor, Tensor> run(const AddRmsNormProblem& problem) {
  const Tensor sum = empty_result(problem);
  const Tensor y = empty_result(problem);
  encode_problem<NormProblem>(problem, operands_of(problem, y, sum));
  return {sum, y};
}

Tensor run(const RopeIntoCacheProblem& problem) {
  const Tensor queries = at::empty(problem.output(), problem.x.options());
  encode_problem(problem, operands_of(problem, queries));
  return queries;
}

Tensor run(const RopeProblem& problem) {
  const Tensor y = at::empty(problem.output, problem.x.options());
  encode_problem(problem, operands_of(problem, y));
  return y;
}

Tensor run(const GateProblem& problem) {
  const Tensor y = at::empty(problem.output, problem.gates.tensor.options());
  encode_problem(problem, operands_of(problem, y));
  return y;
}

Tensor run(GatedMatmulProblem given) {
  const GatedMatmulProblem problem = with_kernel_dtype(std::move(given));
  const auto facts = facts_of(problem);
  const PreparedPlan* plan = facts.empty() ? nullptr : &plan_of(facts.front(), op_of(problem));
  if (plan != nullptr && plan->plan.launches.empty()) {  // all facts alike: they differ in places alone
    return run(problem.of_product(run(problem.matmul)));
  }
  const Tensor y = at::empty(problem.output(), problem.matmul.x.tensor.options().dtype(problem.matmul.dtype));
  const Operands operands = operands_of(problem, y);
  for (size_t i = 0; i < facts.size(); ++i) {
    encode(i == 0 ? *plan : plan_of(facts[i], op_of(problem)), operands);
  }
  return y;
}

Tensor run(const AttentionProblem& problem) {
  if (problem.is_empty()) {
    return at::zeros(problem.output(), problem.q.options());
  }
  const Tensor y = at::empty(problem.output(), problem.q.options());
  encode_problem(problem, operands_of(problem, y));
  return y;
}

Tensor run(const SampleProblem& problem) {
  const Tensor tokens = at::empty(problem.output, problem.logits.tensor.options().dtype(at::kLong));
  encode_problem(problem, operands_of(problem, tokens));
  return tokens;
}

std::tuple<Tensor, Tensor> run(const RouterProblem& problem) {
  auto results = empty_routed(problem);
  encode_problem(problem, operands_of(problem, results));
  return results;
}

Tensor run(const CombineProblem& problem) {
  const Tensor y = at::empty(problem.output, problem.y.tensor.options());
  encode_problem(problem, operands_of(problem, y));
  return y;
}

Tensor run(const ImageProblem& problem) {
  const Tensor y = at::empty(problem.output, problem.x.options().dtype(at::kFloat));
  encode_problem(problem, operands_of(problem, y));
  return y;
}

}  // namespace quantization_mlx::metal
