// Plans of quantize and dequantize, which take whole matrices.
#include <c10/util/Exception.h>

#include "launches.h"

namespace quantization_mlx::gpu {
namespace {

constexpr uint32_t matrix_threads = elementwise_threads_per_threadgroup();

uint32_t threadgroups_for(std::string_view op, int64_t threads) {
  // A kernel knows its place as the number of a thread, in 32 bits.
  checked_int(op, "the number of runs of elements", threads);
  return static_cast<uint32_t>(ceil_div(threads, matrix_threads));
}

// columns: of a matrix whose columns are packed.
void set_matrix_params(Launch& launch, std::string_view op, int64_t elements, int64_t columns) {
  if (is_column_packed(launch.kernel.format.mode)) {
    set_params(launch, QuantizeColumnsParams{elements, checked_int(op, "the last size of w", columns)}, 5);
  } else {
    set_params(launch, QuantizeParams{elements}, 5);
  }
}

bool is_dense(const OperandFacts& operand) {
  return operand.count <= 1 || operand.matrix_stride == operand.row_stride * operand.rows;
}

// Nothing stands in for these kernels.
void require(Family family, std::string_view op, const Target& target) {
  TORCH_CHECK(!target.excluded.contains(family), no_family_left(op, target));
}

}  // namespace

Plan plan(const DequantizeFacts& facts, std::string_view op, const Target& target) {
  require(Family::dequantize, op, target);
  const OperandFacts& words = facts.words;
  // Matrices without gaps are one long row.
  const bool dense = is_dense(words) && is_dense(facts.scales) && is_dense(facts.biases);
  const int64_t matrix = words.rows * words.row_stride * 32 / facts.format.bits;
  const int64_t launches = dense ? 1 : words.count;
  const int64_t elements = dense ? matrix * words.count : matrix;
  Plan plan;
  for (int64_t i = 0; i < launches; ++i) {
    const int64_t first = i * words.matrix_stride;
    Launch launch = launch_of(Family::dequantize, "dequantize", 1, facts.format, facts.dtype);
    launch.kernel.constants =
        constant(QUANTIZATION_MLX_ALIGNED_WEIGHTS, is_aligned(words, first, load_bytes(facts.format))) |
        constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE, facts.global_scales > 0);
    launch.kernel.threads = matrix_threads;
    launch.threadgroups = {threadgroups_for(op, ceil_div(elements, 32)), 1, 1};
    set_arguments(
        launch,
        {{Role::w, first},
         {Role::scales, i * facts.scales.matrix_stride},
         facts.biases.is_given() ? Argument{Role::biases, i * facts.biases.matrix_stride} : Argument{},
         facts.global_scales > 0 ? Argument{Role::global_scale} : Argument{},
         {Role::y, i * matrix}});
    set_matrix_params(launch, op, elements, words.row_stride);
    plan.launches.push_back(launch);
  }
  return plan;
}

Plan plan(const QuantizeFacts& facts, std::string_view op, const Target& target) {
  require(Family::quantize, op, target);
  const Mode mode = facts.format.mode;
  const int64_t elements_per_thread = is_column_packed(mode) ? facts.format.group_size : 8;
  Launch launch = launch_of(Family::quantize, "quantize", 1, facts.format, facts.dtype);
  launch.kernel.constants = constant(QUANTIZATION_MLX_ALIGNED_X, facts.misalignment == 0) |
      constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE, facts.global_scales > 0);
  launch.kernel.threads = matrix_threads;
  launch.threadgroups = {threadgroups_for(op, facts.elements / elements_per_thread), 1, 1};
  set_arguments(
      launch,
      {{Role::x},
       facts.global_scales > 0 ? Argument{Role::global_scale} : Argument{},
       {Role::w},
       {Role::scales},
       has_biases(mode) || has_zeros(mode) ? Argument{Role::biases} : Argument{}});
  set_matrix_params(launch, op, facts.elements, facts.columns);
  Plan plan;
  plan.launches.push_back(launch);
  return plan;
}

}  // namespace quantization_mlx::gpu
