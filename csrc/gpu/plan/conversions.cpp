// Plans of quantize and dequantize, which take whole matrices.
#include <utility>

#include "launches.h"

namespace quantization_mlx::gpu {
namespace {

constexpr uint32_t matrix_threads = 64;

uint32_t threadgroups_for(std::string_view op, int64_t threads) {
  // A kernel knows its place as the number of a thread, in 32 bits.
  checked_int(op, "the number of runs of elements", threads);
  return static_cast<uint32_t>(ceil_div(threads, matrix_threads));
}

// columns: of a matrix whose columns are packed.
void set_matrix_params(Launch& launch, std::string_view op, int64_t elements, int64_t columns) {
  if (is_column_packed(launch.format.mode)) {
    set_params(launch, QuantizeColumnsParams{elements, checked_int(op, "the last size of w", columns)}, 5);
  } else {
    set_params(launch, QuantizeParams{elements}, 5);
  }
}

bool is_dense(const Matrices& matrices) {
  return !matrices.tensor.defined() || matrices.count == 1 ||
      matrices.matrix_stride == matrices.row_stride * matrices.tensor.size(-2);
}

}  // namespace

Plan plan(const DequantizeProblem& problem, const Target&) {
  if (is_empty(problem.output)) {
    return {};
  }
  const auto& weights = problem.weights;
  const Matrices& words = weights.words;
  // Matrices without gaps are one long row.
  const bool dense = is_dense(words) && is_dense(weights.scales) && is_dense(weights.biases);
  const int64_t matrix = words.tensor.size(-2) * words.row_stride * 32 / weights.format.bits;
  const int64_t launches = dense ? 1 : words.count;
  const int64_t elements = dense ? matrix * words.count : matrix;
  Plan plan;
  for (int64_t i = 0; i < launches; ++i) {
    const int64_t first = i * words.matrix_stride;
    Launch launch = launch_of(Family::quantize, "dequantize", 1, weights.format, problem.dtype);
    launch.constants =
        constant(QUANTIZATION_MLX_ALIGNED_WEIGHTS, is_aligned(words.tensor, first, load_bytes(weights.format))) |
        constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE, weights.global_scale.defined());
    launch.threads = matrix_threads;
    launch.threadgroups = {threadgroups_for("dequantize", ceil_div(elements, 32)), 1, 1};
    const bool biases = weights.biases.tensor.defined();
    set_arguments(
        launch,
        {{Role::w, first},
         {Role::scales, i * weights.scales.matrix_stride},
         biases ? Argument{Role::biases, i * weights.biases.matrix_stride} : Argument{},
         weights.global_scale.defined() ? Argument{Role::global_scale} : Argument{},
         {Role::y, i * matrix}});
    set_matrix_params(launch, "dequantize", elements, words.row_stride);
    plan.launches.push_back(std::move(launch));
  }
  return plan;
}

Plan plan(const QuantizeProblem& problem, const Target&) {
  if (problem.w.numel() == 0) {
    return {};
  }
  const int64_t elements_per_thread = is_column_packed(problem.format.mode) ? problem.format.group_size : 8;
  Launch launch = launch_of(Family::quantize, "quantize", 1, problem.format, problem.w.scalar_type());
  launch.constants = constant(QUANTIZATION_MLX_ALIGNED_X, is_aligned(problem.w, 0, 16)) |
      constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE, problem.global_scale.defined());
  launch.threads = matrix_threads;
  launch.threadgroups = {threadgroups_for("quantize", problem.w.numel() / elements_per_thread), 1, 1};
  set_arguments(
      launch,
      {{Role::x},
       problem.global_scale.defined() ? Argument{Role::global_scale} : Argument{},
       {Role::w},
       {Role::scales},
       has_biases(problem.format.mode) || has_zeros(problem.format.mode) ? Argument{Role::biases} : Argument{}});
  set_matrix_params(launch, "quantize", problem.w.numel(), problem.w.size(-1));
  Plan plan;
  plan.launches.push_back(std::move(launch));
  return plan;
}

}  // namespace quantization_mlx::gpu
