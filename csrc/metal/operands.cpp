#include "operands.h"

namespace quantization_mlx::metal {

using at::Tensor;
using gpu::Role;

namespace {

Operands operands_of(const QuantizedMatrices& weights, const Tensor& y) {
  Operands operands;
  operands[Role::w] = &weights.words.tensor;
  operands[Role::scales] = &weights.scales.tensor;
  operands[Role::biases] = &weights.biases.tensor;
  operands[Role::global_scale] = &weights.global_scale;
  operands[Role::y] = &y;
  return operands;
}

}  // namespace

Operands operands_of(const MatmulProblem& problem, const Tensor& y) {
  Operands operands = operands_of(problem.weights, y);
  operands[Role::x] = &problem.x.tensor;
  return operands;
}

Operands operands_of(const GatherProblem& problem, const Tensor& y) {
  Operands operands = operands_of(problem.matmul, y);
  operands[Role::lhs_indices] = &problem.lhs_indices;
  operands[Role::rhs_indices] = &problem.rhs_indices;
  return operands;
}

Operands operands_of(const GatedMatmulProblem& problem, const Tensor& y) { return operands_of(problem.matmul, y); }

Operands operands_of(const DequantizeProblem& problem, const Tensor& y) { return operands_of(problem.weights, y); }

Operands operands_of(const QuantizeProblem& problem, const std::tuple<Tensor, Tensor, Tensor>& results) {
  Operands operands;
  operands[Role::x] = &problem.w;
  operands[Role::global_scale] = &problem.global_scale;
  operands[Role::w] = &std::get<0>(results);
  operands[Role::scales] = &std::get<1>(results);
  operands[Role::biases] = &std::get<2>(results);
  return operands;
}

Operands operands_of(const NormProblem& problem, const Tensor& y, const Tensor& sum) {
  Operands operands;
  operands[Role::x] = &problem.x.tensor;
  operands[Role::residual] = &problem.residual.tensor;
  operands[Role::weight] = &problem.weight;
  operands[Role::x_weight] = &problem.x_weight;
  operands[Role::bias] = &problem.bias;
  operands[Role::sum] = &sum;
  operands[Role::y] = &y;
  return operands;
}

Operands operands_of(const RopeIntoCacheProblem& problem, const Tensor& queries) {
  Operands operands;
  operands[Role::x] = &problem.x;
  operands[Role::bias] = &problem.bias;
  operands[Role::query_norm] = &problem.query_norm;
  operands[Role::key_norm] = &problem.key_norm;
  operands[Role::cosines] = &problem.cosines;
  operands[Role::sines] = &problem.sines;
  operands[Role::keys] = &problem.keys;
  operands[Role::values] = &problem.values;
  operands[Role::y] = &queries;
  return operands;
}

Operands operands_of(const SampleProblem& problem, const Tensor& tokens) {
  Operands operands;
  operands[Role::x] = &problem.logits.tensor;
  operands[Role::seeds] = &problem.seeds;
  operands[Role::previous] = &problem.previous;
  operands[Role::y] = &tokens;
  operands.numbers = {problem.seed, problem.offset};
  return operands;
}

Operands operands_of(const RouterProblem& problem, const std::tuple<Tensor, Tensor>& results) {
  Operands operands;
  operands[Role::x] = &problem.logits.tensor;
  operands[Role::bias] = &problem.bias;
  operands[Role::experts] = &std::get<0>(results);
  operands[Role::y] = &std::get<1>(results);
  return operands;
}

Operands operands_of(const CombineProblem& problem, const Tensor& y) {
  Operands operands;
  operands[Role::x] = &problem.y.tensor;
  operands[Role::weight] = &problem.weights;
  operands[Role::residual] = &problem.residual.tensor;
  operands[Role::bias] = &problem.bias.tensor;
  operands[Role::experts] = &problem.experts;
  operands[Role::y] = &y;
  return operands;
}

Operands operands_of(const AttentionProblem& problem, const Tensor& y) {
  Operands operands;
  operands[Role::queries] = &problem.q;
  operands[Role::keys] = &problem.k.tensor;
  operands[Role::values] = &problem.v.tensor;
  operands[Role::key_scales] = &problem.k.scales;
  operands[Role::key_biases] = &problem.k.biases;
  operands[Role::value_scales] = &problem.v.scales;
  operands[Role::value_biases] = &problem.v.biases;
  operands[Role::mask] = &problem.mask;
  operands[Role::sinks] = &problem.sinks;
  operands[Role::y] = &y;
  return operands;
}

Operands operands_of(const RopeProblem& problem, const Tensor& y) {
  Operands operands;
  operands[Role::x] = &problem.x;
  operands[Role::offsets] = &problem.offsets;
  operands[Role::freqs] = &problem.freqs;
  operands[Role::y] = &y;
  operands.numbers.offset = problem.offset;
  return operands;
}

Operands operands_of(const GateProblem& problem, const Tensor& y) {
  Operands operands;
  operands[Role::gates] = &problem.gates.tensor;
  operands[Role::values] = &problem.values.tensor;
  operands[Role::bias] = &problem.gate_bias.tensor;
  operands[Role::value_bias] = &problem.value_bias.tensor;
  operands[Role::experts] = &problem.experts;
  operands[Role::y] = &y;
  return operands;
}

Operands operands_of(const ImageProblem& problem, const Tensor& y) {
  Operands operands;
  operands[Role::x] = &problem.x;
  operands[Role::bias] = &problem.mean;
  operands[Role::weight] = &problem.deviation;
  operands[Role::y] = &y;
  return operands;
}

}  // namespace quantization_mlx::metal
