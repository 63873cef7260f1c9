// Examples of the ops between products.
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <utility>

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

// Heads that are no multiple of a simdgroup's lanes, of two sequences, into the middle of a cache.
Reason failure(const RopeCacheFacts& facts, const Launch&, const Target& target) {
  constexpr int64_t batch = 2, tokens = 3, query_heads = 4, key_heads = 2, capacity = 7, dim = 80;
  constexpr int64_t width = (query_heads + 2 * key_heads) * dim;
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const int64_t rotated = facts.rotated == 0 ? 0 : (facts.rotated < facts.dim ? 72 : dim);
  const int64_t sequences = facts.has_angles_of_sequences ? batch : 1;
  Maker make{at::Device(at::kCPU)};
  const auto given = [&](bool is_given, c10::IntArrayRef sizes) {
    return is_given ? OptionalTensor(make.uniform(sizes, dtype, -1.0f, 1.0f)) : std::nullopt;
  };
  const OptionalTensor cosines = given(rotated > 0, {sequences, tokens, rotated});
  const OptionalTensor sines = given(rotated > 0, {sequences, tokens, rotated});
  const OptionalTensor bias = given(facts.has_bias, {width});
  const OptionalTensor query_norm = given(facts.has_query_norm, {dim});
  const OptionalTensor key_norm = given(facts.has_key_norm, {dim});
  const Tensor x = make.uniform({batch, tokens, width}, dtype, -1.0f, 1.0f);
  const auto called = [&](const auto& function, const Tensor& keys, const Tensor& values) {
    const auto on = [&](const OptionalTensor& tensor) {
      return tensor.has_value() ? OptionalTensor(tensor->to(keys.device())) : std::nullopt;
    };
    return function(*on(x), on(cosines), on(sines), keys, values, 2, on(bias), on(query_norm), on(key_norm), 0.01);
  };
  const auto empty_cache = [&] { return at::zeros({batch, key_heads, capacity, dim}, x.options()); };
  const Tensor host_keys = empty_cache();
  const Tensor host_values = empty_cache();
  const Tensor keys = host_keys.to(mps);
  const Tensor values = host_values.to(mps);
  const Tensor expected = called(ops::rope_into_cache, host_keys, host_values);
  const RopeIntoCacheProblem problem = called(RopeIntoCacheProblem::check, keys, values);
  const Tensor queries = at::empty(problem.output(), problem.x.options());
  run(gpu::plan(problem, target), operands_of(problem, queries));
  for (const auto& [ours, theirs] : {std::pair(queries, expected), {keys, host_keys}, {values, host_values}}) {
    if (Reason reason = judged(ours, theirs, dtype)) {
      return reason;
    }
  }
  return std::nullopt;
}

// The heads and, up to a few, the queries of the call; keys that end within what a simdgroup takes at once, and enough
// of them where they are cut up.
Reason failure(const AttentionFacts& facts, const Launch& launch, const Target& target) {
  constexpr int64_t most_rows = 70;
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const int64_t group = facts.query_heads / facts.key_heads;
  const int64_t queries = std::min(facts.queries, std::max<int64_t>(most_rows / group, 1));
  const bool is_split = is_set(launch.kernel, QUANTIZATION_MLX_SPLIT_KEYS) || launch.argument_count == 3;
  const int64_t key_heads = is_split ? 1 : 2;
  const int64_t keys = is_split ? 1033 : 203;
  const int64_t shift = is_set(launch.kernel, QUANTIZATION_MLX_ALIGNED_X) ? 0 : 1;
  Maker make{at::Device(at::kCPU)};
  const auto heads = [&](int64_t count, int64_t length, int64_t dim) {
    return make.uniform({1, count, length, dim + shift}, dtype, -1.0f, 1.0f);
  };
  // A view that begins as it does on the other device.
  const auto shifted = [&](const Tensor& tensor) { return tensor.narrow(-1, shift, tensor.size(-1) - shift); };
  const Tensor q = heads(key_heads * group, queries, facts.dim);
  const Tensor k = heads(key_heads, keys, facts.dim);
  const Tensor v = heads(key_heads, keys, facts.value_dim);
  OptionalTensor mask;
  if (facts.has_bool_mask) {
    mask = make.tensor<bool>({queries, keys}, at::kBool, at::kBool, [&] { return make.bits() % 4 != 0; });
  } else if (facts.has_added_mask) {
    mask = make.uniform({queries, keys}, dtype, -2.0f, 2.0f);
  }
  OptionalTensor sinks;
  if (facts.has_sinks) {
    sinks = make.uniform({key_heads * group}, dtype, 2.0f, 4.0f);
  }
  const std::optional<int64_t> window = facts.has_window ? std::optional(keys - 40) : std::nullopt;
  const double scale = 2.0 / std::sqrt(static_cast<double>(facts.dim));
  const Tensor expected =
      ops::scaled_dot_product_attention(shifted(q), shifted(k), shifted(v), scale, mask, facts.causal, sinks, window);
  const AttentionProblem problem = AttentionProblem::check(
      shifted(q.to(mps)), shifted(k.to(mps)), shifted(v.to(mps)), scale, on_mps(mask), facts.causal, on_mps(sinks),
      window);
  const Tensor y = at::empty(problem.output(), problem.q.options());
  run(gpu::plan(problem, target), operands_of(problem, y));
  return judged(y, expected, dtype);
}

}  // namespace quantization_mlx::metal
