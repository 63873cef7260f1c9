// Plans of mixtures of experts: a simdgroup routes a token; a thread combines a few of a token's columns.
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>

#include "launches.h"

namespace quantization_mlx::gpu {
namespace {

// A power of two, for the experts of a lane.
int64_t router_width(int64_t experts) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(ceil_div(experts, 32))));
}

bool is_aligned(const CombineFacts& facts) {
  const auto bytes = static_cast<int64_t>(at::elementSize(static_cast<at::ScalarType>(facts.dtype)));
  const auto whole = [&](int64_t elements) { return elements * bytes % 16 == 0; };
  return !facts.is_misaligned && facts.length % combine_elements() == 0 && whole(facts.y_stride) &&
      whole(facts.residual_stride) && whole(facts.bias_stride);
}

Argument given(bool is_given, Role role) { return is_given ? Argument{role} : Argument{}; }

}  // namespace

Plan plan(const RouterFacts& facts, std::string_view op, const Target& target) {
  TORCH_CHECK(!target.excluded.contains(Family::router), no_family_left(op, target));
  const int tokens = checked_int(op, "the number of tokens", facts.tokens);
  const std::string kernel = "moe_router_" + std::to_string(32 * router_width(facts.experts));
  Launch launch = launch_of(Family::router, kernel, 1, Format{}, facts.dtype);
  launch.kernel.constants = constant(QUANTIZATION_MLX_HAS_BIAS, facts.has_bias);
  launch.kernel.threads = 32 * router_simdgroups();
  launch.threadgroups = {static_cast<uint32_t>(ceil_div(tokens, router_simdgroups())), 1, 1};
  set_arguments(launch, {{Role::x}, given(facts.has_bias, Role::bias), {Role::experts}, {Role::y}});
  const auto as_int = [](int64_t value) { return static_cast<int>(value); };
  set_params(
      launch,
      RouterParams{
          facts.row_stride, tokens, as_int(facts.experts), as_int(facts.k), as_int(facts.groups),
          as_int(facts.groups_used), facts.scoring, facts.chooses_by_score, facts.normalise,
          std::bit_cast<float>(facts.scale)},
      4);
  return {{launch}, 0};
}

Plan plan(const CombineFacts& facts, std::string_view op, const Target& target) {
  TORCH_CHECK(!target.excluded.contains(Family::combine), no_family_left(op, target));
  const int tokens = checked_int(op, "the number of tokens", facts.tokens);
  const int length = checked_int(op, "the last size of y", facts.length);
  const int k = checked_int(op, "the number of experts of a token", facts.k);
  const bool is_wide = facts.has_wide_weights != 0;
  Launch launch =
      launch_of(Family::combine, is_wide ? "moe_combine_float32_weights" : "moe_combine", 1, Format{}, facts.dtype);
  launch.kernel.constants = constant(QUANTIZATION_MLX_ALIGNED_X, is_aligned(facts)) |
      constant(QUANTIZATION_MLX_HAS_RESIDUAL, facts.has_residual) |
      constant(QUANTIZATION_MLX_HAS_BIAS, facts.experts > 0);
  launch.kernel.threads = elementwise_threads_per_threadgroup();
  const int64_t of_threadgroup = int64_t{combine_elements()} * elementwise_threads_per_threadgroup();
  launch.threadgroups = {static_cast<uint32_t>(ceil_div(length, of_threadgroup)), static_cast<uint32_t>(tokens), 1};
  set_arguments(
      launch,
      {{Role::x},
       {Role::weight},
       given(facts.has_residual, Role::residual),
       given(facts.experts > 0, Role::bias),
       given(facts.experts > 0, Role::experts),
       {Role::y}});
  set_params(
      launch, CombineParams{facts.y_stride, facts.residual_stride, facts.bias_stride, facts.experts, k, length}, 6);
  return {{launch}, 0};
}

}  // namespace quantization_mlx::gpu
