#include "../facts.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <tuple>
#include <utility>

namespace quantization_mlx::gpu {
namespace {

int64_t broadcast_size(c10::IntArrayRef own, size_t rank, size_t i) {
  return i + own.size() < rank ? 1 : own[i + own.size() - rank];
}

using BatchDimensions = c10::SmallVector<BatchDimension, 4>;
using BatchParts = c10::SmallVector<BatchPart, 1>;

BatchDimensions batch_dimensions(const MatmulShape<int64_t>& shape) {
  const size_t rank = shape.batch.size();
  BatchDimensions dimensions;  // innermost first
  int64_t x_step = 1;
  int64_t w_step = 1;
  int64_t y_step = 1;
  for (size_t i = rank; i-- > 0;) {
    const int64_t size = shape.batch[i];
    const int64_t x_size = broadcast_size(shape.x_batch, rank, i);
    const int64_t w_size = broadcast_size(shape.w_batch, rank, i);
    const BatchDimension next{size, x_size == 1 ? 0 : x_step, w_size == 1 ? 0 : w_step, y_step};
    x_step *= x_size;
    w_step *= w_size;
    y_step *= size;
    if (size == 1) {
      continue;
    }
    if (!dimensions.empty()) {
      BatchDimension& last = dimensions.back();
      if (next.x == last.x * last.size && next.w == last.w * last.size) {  // both are one dimension
        last.size *= size;
        continue;
      }
    }
    dimensions.push_back(next);
  }
  return dimensions;
}

// A product's batch: one part for every position in the dimensions beyond two.
BatchParts batch_parts(const MatmulShape<int64_t>& shape) {
  const auto dimensions = batch_dimensions(shape);
  BatchParts parts(1);
  for (size_t i = 0; i < dimensions.size(); ++i) {
    const BatchDimension& dimension = dimensions[i];
    if (i < 2) {
      (i == 0 ? parts[0].inner : parts[0].outer) = dimension;
      continue;
    }
    BatchParts next;
    for (const BatchPart& part : parts) {
      for (int64_t j = 0; j < dimension.size; ++j) {
        next.push_back(part);
        next.back().x += j * dimension.x;
        next.back().w += j * dimension.w;
        next.back().y += j * dimension.y;
      }
    }
    parts = std::move(next);
  }
  return parts;
}

int32_t misalignment_of(const at::Tensor& tensor) {
  return static_cast<int32_t>(tensor.storage_offset() * static_cast<int64_t>(tensor.element_size()) % 16);
}

OperandFacts operand_facts(const Matrices& matrices, int64_t rows) {
  const at::Tensor& tensor = matrices.tensor;
  return {matrices.count,
          rows,
          matrices.matrix_stride,
          matrices.row_stride,
          static_cast<int32_t>(tensor.element_size()),
          misalignment_of(tensor)};
}

// Of weights, whose rows follow one another without gaps.
OperandFacts weight_facts(const Matrices& matrices) {
  return matrices.tensor.defined() ? operand_facts(matrices, matrices.tensor.size(-2)) : OperandFacts{};
}

int64_t global_scales(const QuantizedMatrices& weights) {
  return weights.global_scale.defined() ? weights.global_scale.numel() : 0;
}

// Those of the whole product but for its batch.
ProductFacts product_facts(const MatmulProblem& problem) {
  const MatmulShape<int64_t>& shape = problem.shape;
  ProductFacts facts{};
  facts.format = problem.weights.format;
  facts.dtype = static_cast<int32_t>(problem.dtype);
  facts.transpose = problem.transpose;
  facts.M = shape.M;
  facts.K = shape.K;
  facts.N = shape.N;
  facts.global_scales = global_scales(problem.weights);
  facts.x = operand_facts(problem.x, shape.M);
  facts.words = weight_facts(problem.weights.words);
  facts.scales = weight_facts(problem.weights.scales);
  facts.biases = weight_facts(problem.weights.biases);
  return facts;
}

bool is_empty(const Sizes<int64_t>& sizes) { return std::find(sizes.begin(), sizes.end(), 0) != sizes.end(); }

}  // namespace

c10::SmallVector<ProductFacts, 1> facts_of(const MatmulProblem& problem) {
  if (is_empty(problem.shape.output)) {
    return {};
  }
  c10::SmallVector<ProductFacts, 1> result;
  ProductFacts facts = product_facts(problem);
  for (const BatchPart& part : batch_parts(problem.shape)) {
    facts.batch = part;
    result.push_back(facts);
  }
  return result;
}

c10::SmallVector<ProductFacts, 1> facts_of(const GatedMatmulProblem& problem) {
  auto result = facts_of(problem.matmul);
  for (ProductFacts& facts : result) {
    facts.N = problem.length();
    facts.gate = 1 + static_cast<int64_t>(problem.kind);
  }
  return result;
}

c10::SmallVector<ProductFacts, 1> facts_of(const GatherProblem& problem) {
  if (is_empty(problem.matmul.shape.output)) {
    return {};
  }
  ProductFacts facts = product_facts(problem.matmul);
  facts.pairs = problem.lhs_indices.numel();
  // Gathered matrices are chosen by their index, so all that a launch steps over is y.
  facts.batch.outer = {facts.pairs, 0, 0, 1};
  facts.batch.inner = {1, 0, 0, 0};
  return {facts};
}

c10::SmallVector<DequantizeFacts, 1> facts_of(const DequantizeProblem& problem) {
  if (is_empty(problem.output)) {
    return {};
  }
  const QuantizedMatrices& weights = problem.weights;
  return {DequantizeFacts{
      weights.format, static_cast<int32_t>(problem.dtype), global_scales(weights), weight_facts(weights.words),
      weight_facts(weights.scales), weight_facts(weights.biases)}};
}

c10::SmallVector<QuantizeFacts, 1> facts_of(const QuantizeProblem& problem) {
  if (problem.w.numel() == 0) {
    return {};
  }
  return {QuantizeFacts{
      problem.format, static_cast<int32_t>(problem.w.scalar_type()), problem.global_scale.defined() ? 1 : 0,
      problem.w.numel(), problem.w.size(-1), misalignment_of(problem.w)}};
}

c10::SmallVector<NormFacts, 1> facts_of(const NormProblem& problem) {
  if (problem.is_empty()) {
    return {};
  }
  bool is_misaligned = false;
  for (const at::Tensor* tensor :
       {&problem.x.tensor, &problem.residual.tensor, &problem.weight, &problem.bias, &problem.x_weight}) {
    is_misaligned |= tensor->defined() && misalignment_of(*tensor) != 0;
  }
  return {NormFacts{
      static_cast<int32_t>(problem.kind), static_cast<int32_t>(problem.x.tensor.scalar_type()), problem.x.count,
      problem.length, problem.x.stride, problem.residual.stride, problem.residual.tensor.defined(),
      problem.weight.defined(), problem.bias.defined(), is_misaligned, std::bit_cast<int64_t>(problem.epsilon),
      std::bit_cast<int64_t>(problem.scale), problem.x_weight.defined()}};
}

c10::SmallVector<RopeCacheFacts, 1> facts_of(const RopeIntoCacheProblem& problem) {
  if (problem.x.numel() == 0) {
    return {};
  }
  RopeCacheFacts facts{};
  facts.dtype = static_cast<int32_t>(problem.x.scalar_type());
  facts.has_bias = problem.bias.defined();
  facts.has_angles_of_sequences = problem.has_angles_of_sequences();
  facts.batch = problem.batch();
  facts.tokens = problem.tokens();
  facts.query_heads = problem.query_heads;
  facts.key_heads = problem.key_heads();
  facts.query_norm_heads = problem.query_norm_heads();
  facts.key_norm_heads = problem.key_norm_heads();
  facts.dim = problem.dim();
  facts.rotated = problem.rotated();
  facts.capacity = problem.capacity();
  facts.position = problem.position;
  facts.epsilon = std::bit_cast<int64_t>(problem.epsilon);
  return {facts};
}

c10::SmallVector<SampleFacts, 1> facts_of(const SampleProblem& problem) {
  const Vectors& logits = problem.logits;
  if (logits.count == 0) {
    return {};
  }
  const SampleRules& rules = problem.rules;
  return {SampleFacts{
      static_cast<int32_t>(logits.tensor.scalar_type()), misalignment_of(logits.tensor) != 0, logits.count,
      problem.vocabulary, logits.stride, problem.previous_count(), problem.seeds.defined(), problem.has_row_seeds,
      rules.top_k, rules.top_p, rules.farthest, std::bit_cast<int32_t>(rules.scale),
      std::bit_cast<int32_t>(rules.penalty)}};
}

c10::SmallVector<RouterFacts, 1> facts_of(const RouterProblem& problem) {
  const Vectors& logits = problem.logits;
  if (logits.count == 0) {
    return {};
  }
  return {RouterFacts{
      static_cast<int32_t>(logits.tensor.scalar_type()), static_cast<int32_t>(problem.scoring), logits.count,
      problem.experts, logits.stride, problem.k, problem.groups, problem.groups_used, problem.bias.defined(),
      problem.chooses_by_score(), problem.normalise, std::bit_cast<int32_t>(problem.scale)}};
}

c10::SmallVector<CombineFacts, 1> facts_of(const CombineProblem& problem) {
  const auto dtype = problem.y.tensor.scalar_type();
  const at::Tensor& residual = problem.residual.tensor;
  if (is_empty(problem.output)) {
    return {};
  }
  const at::Tensor& bias = problem.bias.tensor;
  const bool is_misaligned = misalignment_of(problem.y.tensor) != 0 ||
      (residual.defined() && misalignment_of(residual) != 0) || (bias.defined() && misalignment_of(bias) != 0);
  return {CombineFacts{
      static_cast<int32_t>(dtype), problem.weights.scalar_type() != dtype, problem.tokens(), problem.k, problem.length,
      problem.y.stride, problem.residual.stride, problem.bias.stride, bias.defined() ? bias.size(0) : 0,
      residual.defined(), is_misaligned}};
}

c10::SmallVector<AttentionFacts, 1> facts_of(const AttentionProblem& problem) {
  if (problem.is_empty()) {
    return {};
  }
  AttentionFacts facts{};
  facts.batch = problem.batch();
  facts.query_heads = problem.query_heads();
  facts.key_heads = problem.key_heads();
  facts.queries = problem.queries();
  facts.keys = problem.keys();
  facts.dim = problem.dim();
  facts.value_dim = problem.value_dim();
  // A stride that leads nowhere is whatever its tensor was made with.
  const auto copy_strides = [](const at::Tensor& tensor, auto& strides) {
    for (size_t i = 0; i < std::size(strides); ++i) {
      strides[i] = tensor.size(i) > 1 ? tensor.stride(i) : 0;
    }
  };
  copy_strides(problem.q, facts.q_strides);
  copy_strides(problem.k.tensor, facts.k_strides);
  copy_strides(problem.v.tensor, facts.v_strides);
  if (problem.is_packed()) {
    copy_strides(problem.k.scales, facts.k_scale_strides);
    copy_strides(problem.v.scales, facts.v_scale_strides);
    facts.bits = problem.bits;
    facts.group_size = problem.group_size;
  }
  if (problem.mask.defined()) {
    copy_strides(problem.mask, facts.mask_strides);
    facts.has_bool_mask = problem.mask.scalar_type() == at::kBool;
    facts.has_added_mask = !facts.has_bool_mask;
  }
  facts.window = problem.window.value_or(0);
  facts.scale = std::bit_cast<int64_t>(problem.scale);
  facts.softcap = std::bit_cast<int64_t>(problem.softcap);
  facts.dtype = static_cast<int32_t>(problem.q.scalar_type());
  facts.causal = problem.causal;
  facts.has_window = problem.window.has_value();
  facts.has_sinks = problem.sinks.defined();
  for (const at::Tensor* tensor : {&problem.q, &problem.k.tensor, &problem.v.tensor}) {
    facts.is_misaligned |= static_cast<int32_t>(misalignment_of(*tensor) != 0);
  }
  return {facts};
}

c10::SmallVector<RopeFacts, 1> facts_of(const RopeProblem& problem) {
  if (problem.is_empty()) {
    return {};
  }
  return {RopeFacts{
      static_cast<int32_t>(problem.x.scalar_type()), problem.traditional, problem.sequences, problem.heads,
      problem.length, problem.width, problem.pairs(), problem.sequence_stride, problem.head_stride,
      problem.position_stride, problem.offset_stride(),
      problem.offsets.defined() ? static_cast<int32_t>(problem.offsets.element_size()) : 0, problem.freqs.defined(),
      std::bit_cast<int64_t>(problem.base), std::bit_cast<int64_t>(problem.scale), misalignment_of(problem.x)}};
}

c10::SmallVector<GateFacts, 1> facts_of(const GateProblem& problem) {
  if (problem.is_empty()) {
    return {};
  }
  const auto& [gates, values] = std::tie(problem.gates, problem.values);
  bool is_misaligned = false;
  for (const StridedRows* rows : {&gates, &values, &problem.gate_bias, &problem.value_bias}) {
    is_misaligned |= rows->tensor.defined() && misalignment_of(rows->tensor) != 0;
  }
  return {GateFacts{
      static_cast<int32_t>(problem.kind), static_cast<int32_t>(gates.tensor.scalar_type()), problem.rows,
      problem.length, gates.row_stride, gates.stride, values.row_stride, values.stride, problem.gate_bias.row_stride,
      problem.gate_bias.stride, problem.value_bias.row_stride, problem.value_bias.stride, problem.expert_count(),
      std::bit_cast<int64_t>(problem.alpha), std::bit_cast<int64_t>(problem.limit),
      std::bit_cast<int64_t>(problem.offset), is_misaligned}};
}

c10::SmallVector<ImageFacts, 1> facts_of(const ImageProblem& problem) {
  if (problem.is_empty()) {
    return {};
  }
  const auto& [image_stride, channel_stride, row_stride, column_stride] = problem.strides;
  return {ImageFacts{
      static_cast<int32_t>(problem.x.scalar_type()), problem.mean.defined(), problem.images, problem.channels,
      problem.height, problem.width, problem.new_height, problem.new_width, image_stride, channel_stride, row_stride,
      column_stride, problem.cubic, problem.antialias, problem.channels_last, std::bit_cast<int32_t>(problem.scale)}};
}

}  // namespace quantization_mlx::gpu
