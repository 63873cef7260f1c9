// Examples of the ops between products.
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <c10/util/DimVector.h>

#include <cmath>
#include <string_view>
#include <tuple>
#include <utility>

#include <bit>

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
  const OptionalTensor x_weight = parameter(facts.has_x_weight != 0);
  const double scale = std::bit_cast<double>(facts.scale);
  const Tensor added = x_weight.has_value() ? ops::rms_norm(x.to(at::kFloat), x_weight->to(at::kFloat), epsilon) : x;
  const Tensor sum = residual.defined() ? added.mul(scale).add(residual).to(dtype) : x;
  const Tensor expected = centres ? ops::layer_norm(x, weight, bias, epsilon) : ops::rms_norm(sum, weight, epsilon);

  const auto problem_on_mps = [&]() -> NormProblem {
    if (centres) {
      return LayerNormProblem::check(x.to(mps), on_mps(weight), on_mps(bias), epsilon);
    }
    return residual.defined()
        ? NormProblem(
              AddRmsNormProblem::check(x.to(mps), residual.to(mps), on_mps(weight), epsilon, on_mps(x_weight), scale))
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
  const auto norm = [&](int64_t normed, int64_t heads) { return given(normed > 0, {normed > 1 ? heads * dim : dim}); };
  const OptionalTensor query_norm = norm(facts.query_norm_heads, query_heads);
  const OptionalTensor key_norm = norm(facts.key_norm_heads, key_heads);
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

// Tokens are the CPU's exactly. Rows that keep all threads busy, the last one in part where the kernel takes such.
Reason failure(const SampleFacts& facts, const Launch& launch, const Target& target) {
  constexpr int64_t rows = 3;
  struct Rules {
    double temperature;
    int64_t top_k;
    double top_p;
    double min_p;
  };
  constexpr Rules all_rules[] = {{0.0, 0, 1.0, 0.0}, {1.5, 0, 1.0, 0.0}, {0.8, 40, 0.7, 0.01}, {1.0, 0, 0.5, 0.0}};
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const int64_t at_once = int64_t{launch.kernel.threads} * sample_elements();
  const int64_t vocabulary = at_once - (is_set(launch.kernel, QUANTIZATION_MLX_ALIGNED_X) ? 0 : 3);
  Maker make{at::Device(at::kCPU)};
  const auto integers = [&](c10::IntArrayRef sizes) {
    return make.tensor<int64_t>(sizes, at::kLong, at::kLong, [&] { return make.bits() % vocabulary; });
  };
  const Tensor logits = make.uniform({rows, vocabulary}, dtype, -2.0f, 2.0f);
  const OptionalTensor seeds = facts.has_seeds ? OptionalTensor(integers({rows})) : std::nullopt;
  const OptionalTensor previous = facts.previous > 0 ? OptionalTensor(integers({rows, vocabulary / 2})) : std::nullopt;
  for (const auto& [temperature, top_k, top_p, min_p] : all_rules) {
    constexpr int64_t seed = 7;
    constexpr int64_t offset = 3;
    constexpr double penalty = 4.0;
    const Tensor expected =
        ops::sample(logits, seeds, seed, offset, temperature, top_k, top_p, min_p, penalty, previous);
    const SampleProblem problem = SampleProblem::check(
        logits.to(mps), on_mps(seeds), seed, offset, temperature, top_k, top_p, min_p, penalty, on_mps(previous));
    const Tensor tokens = at::empty(problem.output, problem.logits.tensor.options().dtype(at::kLong));
    run(gpu::plan(problem, target), operands_of(problem, tokens));
    const Tensor ours = tokens.cpu();
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t mine = ours.const_data_ptr<int64_t>()[row];
      const int64_t theirs = expected.const_data_ptr<int64_t>()[row];
      if (mine != theirs) {
        return c10::str("it draws token ", mine, " where the CPU draws ", theirs, ".");
      }
    }
  }
  return std::nullopt;
}

// Tokens that do not fill the last threadgroup, with a lane that has fewer experts than others.
Reason failure(const RouterFacts& facts, const Launch&, const Target& target) {
  constexpr int64_t tokens = 9;
  constexpr int64_t k = 6;
  constexpr double scale = 2.5;
  struct Rules {
    const char* scoring;
    int64_t groups;
    int64_t groups_used;
    bool normalise;
  };
  constexpr Rules all_rules[] = {
      {"softmax", 1, 1, false}, {"sigmoid", 4, 2, true}, {"softmax_of_selected", 1, 1, false}, {"softmax", 2, 1, true}};
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const int64_t experts = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(facts.experts + 31) / 32)) * 32 - 4;
  Maker make{at::Device(at::kCPU)};
  const Tensor logits = make.uniform({tokens, experts}, dtype, -3.0f, 3.0f);
  const OptionalTensor bias =
      facts.has_bias ? OptionalTensor(make.uniform({experts}, at::kFloat, -0.1f, 0.1f)) : std::nullopt;
  for (const auto& [scoring, groups, groups_used, normalise] : all_rules) {
    const auto [expected_experts, expected] =
        ops::moe_router(logits, k, scoring, bias, groups, groups_used, normalise, scale);
    const RouterProblem problem =
        RouterProblem::check(logits.to(mps), k, scoring, on_mps(bias), groups, groups_used, normalise, scale);
    const auto results = empty_routed(problem);
    run(gpu::plan(problem, target), operands_of(problem, results));
    if (!std::get<0>(results).cpu().equal(expected_experts)) {
      return c10::str("with scoring=", scoring, " it chooses other experts than the CPU.");
    }
    if (Reason reason = judged(std::get<1>(results), expected, dtype)) {
      return reason;
    }
  }
  return std::nullopt;
}

namespace {

constexpr int64_t few_experts = 7;

Tensor random_experts(Maker& make, c10::IntArrayRef sizes) {
  return make.tensor<int64_t>(sizes, at::kLong, at::kLong, [&] { return make.bits() % few_experts; });
}

}  // namespace

// Columns of several threadgroups, the last of which is not full.
Reason failure(const CombineFacts& facts, const Launch& launch, const Target& target) {
  constexpr int64_t tokens = 3;
  constexpr int64_t k = 5;
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const int64_t length = is_set(launch.kernel, QUANTIZATION_MLX_ALIGNED_X) ? 304 : 299;
  Maker make{at::Device(at::kCPU)};
  const Tensor y = make.uniform({tokens, k, length}, dtype, -1.0f, 2.0f);
  const Tensor weights = make.uniform({tokens, k}, facts.has_wide_weights ? at::kFloat : dtype, 0.0f, 1.0f);
  const OptionalTensor residual =
      facts.has_residual ? OptionalTensor(make.uniform({tokens, length}, dtype, -1.0f, 1.0f)) : std::nullopt;
  OptionalTensor bias;
  OptionalTensor experts;
  if (facts.experts > 0) {
    bias = make.uniform({few_experts, length}, dtype, -1.0f, 1.0f);
    experts = random_experts(make, {tokens, k});
  }
  const Tensor expected = ops::moe_combine(y, weights, residual, bias, experts);
  const CombineProblem problem =
      CombineProblem::check(y.to(mps), weights.to(mps), on_mps(residual), on_mps(bias), on_mps(experts));
  const Tensor result = at::empty(problem.output, problem.y.tensor.options());
  run(gpu::plan(problem, target), operands_of(problem, result));
  return judged(result, expected, dtype);
}

// The heads and, up to a few, the queries of the call, as many as lead to the same form; keys that end within what a
// simdgroup takes at once, and enough of them where they are cut up.
Reason failure(const AttentionFacts& facts, const Launch& launch, const Target& given) {
  constexpr int64_t most_rows = 70;
  constexpr int64_t tile_queries = 9;
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const bool is_split = is_set(launch.kernel, QUANTIZATION_MLX_SPLIT_KEYS) || launch.argument_count == 3;
  const int64_t key_heads = is_split ? 1 : 2;
  const bool is_tensor = launch.family == Family::tensor;
  const bool is_tile = is_tensor || launch.family == Family::tile;
  Target target = given;
  if (!is_tensor) {  // which serves the example though it may not serve the call
    target.excluded.insert(Family::tensor);
  }
  const int64_t group = facts.query_heads / facts.key_heads;
  const int64_t queries = std::min(facts.queries, std::max(most_rows / group, is_tile ? tile_queries : 1));
  const int64_t keys = is_split ? 1033 : (is_tile ? 203 : 61);  // 61: so few that they are not cut up
  const int64_t shift = is_set(launch.kernel, QUANTIZATION_MLX_ALIGNED_X) ? 0 : 1;
  Maker make{at::Device(at::kCPU)};
  const auto heads = [&](int64_t count, int64_t length, int64_t dim) {
    return make.uniform({1, count, length, dim + shift}, dtype, -1.0f, 1.0f);
  };
  // A view that begins as it does on the other device.
  const auto shifted = [&](const Tensor& tensor) { return tensor.narrow(-1, shift, tensor.size(-1) - shift); };
  const Tensor q = heads(key_heads * group, queries, facts.dim);
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
  // With tensor operations so wide apart that the largest score moves on between blocks of keys.
  const double scale = (is_tensor ? 16.0 : 2.0) / std::sqrt(static_cast<double>(facts.dim));
  const auto softcap =
      std::bit_cast<double>(facts.softcap) > 0.0 ? std::optional(std::bit_cast<double>(facts.softcap)) : std::nullopt;
  const auto judge = [&](const AttentionProblem& problem, const Tensor& expected) {
    const Tensor y = at::empty(problem.output(), problem.q.options());
    run(gpu::plan(problem, target), operands_of(problem, y));
    return judged(y, expected, dtype);
  };
  if (facts.bits == 0) {
    const Tensor k = heads(key_heads, keys, facts.dim);
    const Tensor v = heads(key_heads, keys, facts.value_dim);
    return judge(
        AttentionProblem::check(
            shifted(q.to(mps)), shifted(k.to(mps)), shifted(v.to(mps)), scale, on_mps(mask), facts.causal,
            on_mps(sinks), window, softcap),
        ops::scaled_dot_product_attention(
            shifted(q), shifted(k), shifted(v), scale, mask, facts.causal, sinks, window, softcap));
  }
  const auto packed = [&](int64_t dim) {
    const Tensor words = make.tensor<int32_t>(
        {1, key_heads, keys, dim * facts.bits / 32 + shift}, at::kInt, at::kInt, [&] { return make.bits(); });
    const c10::DimVector groups{1, key_heads, keys, dim / facts.group_size};
    const auto code = static_cast<float>(1 << facts.bits);
    return std::tuple(
        words, make.uniform(groups, dtype, 1.0f / code, 2.0f / code), make.uniform(groups, dtype, -1.0f, -0.5f));
  };
  const auto [k, k_scales, k_biases] = packed(facts.dim);
  const auto [v, v_scales, v_biases] = packed(facts.value_dim);
  return judge(
      QuantizedAttentionProblem::check(
          shifted(q.to(mps)), shifted(k.to(mps)), k_scales.to(mps), k_biases.to(mps), shifted(v.to(mps)),
          v_scales.to(mps), v_biases.to(mps), scale, on_mps(mask), facts.causal, on_mps(sinks), window,
          facts.group_size, facts.bits),
      ops::quantized_scaled_dot_product_attention(
          shifted(q), shifted(k), k_scales, k_biases, shifted(v), v_scales, v_biases, scale, mask, facts.causal, sinks,
          window, facts.group_size, facts.bits));
}

// Several threadgroups and heads that do not divide, at a position whose angle float32 does not hold.
Reason failure(const RopeFacts& facts, const Launch& launch, const Target& given) {
  constexpr int64_t sequences = 2;
  constexpr int64_t heads = 9;
  constexpr int64_t length = 5;
  constexpr int64_t position = 1000003;
  constexpr double scale = 0.75;
  Target target = given;
  target.gpu.cores = 1;  // so that heads share angles
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const bool is_aligned = is_set(launch.kernel, QUANTIZATION_MLX_ALIGNED_X);
  const int64_t dims = is_aligned ? 136 : 134;
  const int64_t width = dims + (is_aligned ? 8 : 5);
  const bool traditional = facts.traditional != 0;
  Maker make{at::Device(at::kCPU)};
  const Tensor x = make.uniform({sequences, heads, length, width}, dtype, -1.0f, 1.0f);
  const auto base = facts.has_freqs != 0 ? std::nullopt : std::optional(10000.0);
  OptionalTensor freqs;
  if (facts.has_freqs != 0) {
    freqs = make.uniform({dims / 2}, at::kFloat, 1.0f, 1000.0f);
  }
  OptionalTensor offsets;
  if (facts.offset_size > 0) {
    const auto integers = facts.offset_size == 4 ? at::kInt : at::kLong;
    offsets = make.tensor<int64_t>({sequences}, at::kLong, integers, [&] { return make.bits() % 4096; });
  }
  const Tensor expected = ops::rope(x, dims, traditional, base, scale, position, offsets, freqs);
  const RopeProblem problem =
      RopeProblem::check(x.to(mps), dims, traditional, base, scale, position, on_mps(offsets), on_mps(freqs));
  const Tensor y = at::empty(problem.output, problem.x.options());
  run(gpu::plan(problem, target), operands_of(problem, y));
  return judged(y, expected, dtype);
}

// Several threadgroups to a row, the last one not full; halves of wider rows or, where the kernel takes such, their
// even and odd columns.
Reason failure(const GateFacts& facts, const Launch& launch, const Target& target) {
  constexpr int64_t rows = 3;
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const auto kind = static_cast<Gate>(facts.kind);
  const bool is_aligned = is_set(launch.kernel, QUANTIZATION_MLX_ALIGNED_X);
  const int64_t at_once = int64_t{launch.kernel.threads} * gate_elements();
  const int64_t several = launch.kernel.threads == elementwise_threads_per_threadgroup() ? 2 : 1;
  const int64_t length = several * at_once - (is_aligned ? 8 : 3);
  Maker make{at::Device(at::kCPU)};
  const Tensor both = make.uniform({rows, 2 * length}, dtype, -3.0f, 3.0f);
  const auto parts = [&](const Tensor& all) {
    return is_aligned ? std::pair(all.narrow(-1, 0, length), all.narrow(-1, length, length))
                      : std::pair(all.slice(-1, 0, 2 * length, 2), all.slice(-1, 1, 2 * length, 2));
  };
  const std::string_view approximate = kind == Gate::geglu_tanh ? "tanh" : "none";
  OptionalTensor biases;
  OptionalTensor experts;
  if (facts.experts > 0) {
    biases = make.uniform({few_experts, 2 * length}, dtype, -1.0f, 1.0f);
    experts = random_experts(make, {rows});
  }
  const auto gated = [&](const auto& swiglu, const auto& geglu, const Tensor& all, const OptionalTensor& of_experts,
                         const OptionalTensor& numbers) {
    const auto [gates, values] = parts(all);
    OptionalTensor gate_bias;
    OptionalTensor value_bias;
    if (of_experts.has_value()) {
      std::tie(gate_bias, value_bias) = parts(*of_experts);
    }
    return kind == Gate::swiglu ? swiglu(gates, values, 1.702, 2.0, 1.0, gate_bias, value_bias, numbers)
                                : geglu(gates, values, approximate);
  };
  const Tensor expected = gated(ops::swiglu, ops::geglu, both, biases, experts);
  const auto check = [](const auto& function) {
    return [&](auto&&... arguments) -> GateProblem { return function(arguments...); };
  };
  const GateProblem problem =
      gated(check(SwigluProblem::check), check(GegluProblem::check), both.to(mps), on_mps(biases), on_mps(experts));
  const Tensor y = at::empty(problem.output, problem.gates.tensor.options());
  run(gpu::plan(problem, target), operands_of(problem, y));
  return judged(y, expected, dtype);
}

// Several threadgroups, the last one not full, and channels of two; both filters, to more rows and fewer columns.
Reason failure(const ImageFacts& facts, const Launch&, const Target& target) {
  constexpr int64_t images = 2, channels = 5, height = 9, width = 61, new_height = 13, new_width = 14;
  constexpr double scale = 0.25;
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const bool channels_last = facts.channels_last != 0;
  Maker make{at::Device(at::kCPU)};
  const float most = dtype == at::kByte ? 255.0f : 1.0f;
  const Tensor planes = make.uniform({images, channels, height, width}, dtype, 0.0f, most);
  const Tensor x = channels_last ? planes.view({images, height, width, channels}) : planes;
  OptionalTensor mean;
  OptionalTensor deviation;
  if (facts.has_statistics != 0) {
    mean = make.uniform({channels}, at::kFloat, 0.0f, 0.25f * most);
    deviation = make.uniform({channels}, at::kFloat, 0.5f, 2.0f);
  }
  for (const char* mode : {"bilinear", "bicubic"}) {
    for (const bool antialias : {false, true}) {
      const Tensor expected =
          ops::resample_image(x, new_height, new_width, mode, antialias, mean, deviation, scale, channels_last);
      const ImageProblem problem = ImageProblem::check(
          x.to(mps), new_height, new_width, mode, antialias, on_mps(mean), on_mps(deviation), scale, channels_last);
      const Tensor y = at::empty(problem.output, problem.x.options().dtype(at::kFloat));
      run(gpu::plan(problem, target), operands_of(problem, y));
      if (Reason reason = judged(y, expected, at::kFloat)) {
        return reason;
      }
    }
  }
  return std::nullopt;
}

}  // namespace quantization_mlx::metal
