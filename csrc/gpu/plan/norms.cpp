// Plans of norms: a threadgroup for each row.
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>

#include "launches.h"

namespace quantization_mlx::gpu {
namespace {

bool is_aligned(const NormFacts& facts) {
  const auto bytes = static_cast<int64_t>(at::elementSize(static_cast<at::ScalarType>(facts.dtype)));
  const auto whole = [&](int64_t elements) { return elements * bytes % 16 == 0; };
  return !facts.is_misaligned && facts.length % norm_elements() == 0 && whole(facts.x_stride) &&
      whole(facts.residual_stride);
}

}  // namespace

Plan plan(const NormFacts& facts, std::string_view op, const Target& target) {
  TORCH_CHECK(!target.excluded.contains(Family::norm), no_family_left(op, target));
  const int64_t elements = norm_elements();
  const bool once = facts.length <= elements * norm_max_threads();
  const bool centres = facts.kind == static_cast<int32_t>(NormProblem::Kind::layer);
  const std::string kernel = std::string(centres ? "layer_norm" : "rms_norm") + (once ? "" : "_long");
  Launch launch = launch_of(Family::norm, kernel, 1, Format{}, facts.dtype);
  launch.kernel.constants = constant(QUANTIZATION_MLX_ALIGNED_X, is_aligned(facts)) |
      constant(QUANTIZATION_MLX_HAS_WEIGHT, facts.has_weight) | constant(QUANTIZATION_MLX_HAS_BIAS, facts.has_bias) |
      constant(QUANTIZATION_MLX_HAS_RESIDUAL, facts.has_residual) |
      constant(QUANTIZATION_MLX_HAS_X_WEIGHT, facts.has_x_weight != 0);
  launch.kernel.threads =
      static_cast<uint32_t>(std::min<int64_t>(norm_max_threads(), ceil_div(ceil_div(facts.length, elements), 32) * 32));
  launch.threadgroups = {static_cast<uint32_t>(checked_int(op, "the number of rows", facts.rows)), 1, 1};
  const auto given = [](bool is_given, Role role) { return is_given ? Argument{role} : Argument{}; };
  set_arguments(
      launch,
      {{Role::x},
       given(facts.has_residual, Role::residual),
       given(facts.has_weight, Role::weight),
       given(facts.has_bias, Role::bias),
       given(facts.has_residual, Role::sum),
       {Role::y},
       given(facts.has_x_weight != 0, Role::x_weight)});
  const int length = checked_int(op, "the last size of x", facts.length);
  const auto number = [](int64_t bits) { return static_cast<float>(std::bit_cast<double>(bits)); };
  set_params(
      launch, NormParams{facts.x_stride, facts.residual_stride, length, number(facts.epsilon), number(facts.scale)}, 7);
  return {{launch}, 0};
}

}  // namespace quantization_mlx::gpu
