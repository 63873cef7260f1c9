// Plans of rope_into_cache: a simdgroup for each head.
#include <c10/util/Exception.h>

#include <bit>

#include "launches.h"

namespace quantization_mlx::gpu {

Plan plan(const RopeCacheFacts& facts, std::string_view op, const Target& target) {
  TORCH_CHECK(!target.excluded.contains(Family::rope_into_cache), no_family_left(op, target));
  Launch launch = launch_of(Family::rope_into_cache, "rope_into_cache", 1, Format{}, facts.dtype);
  const bool has_angles = facts.rotated > 0;
  launch.kernel.constants = constant(QUANTIZATION_MLX_HAS_BIAS, facts.has_bias) |
      constant(QUANTIZATION_MLX_HAS_QUERY_NORM, facts.query_norm_heads > 0) |
      constant(QUANTIZATION_MLX_HAS_KEY_NORM, facts.key_norm_heads > 0) |
      constant(QUANTIZATION_MLX_HAS_ANGLES, has_angles);
  launch.kernel.threads = 32 * rope_cache_simdgroups();
  const int64_t heads = facts.query_heads + 2 * facts.key_heads;
  const int count = checked_int(op, "the number of heads of all tokens", facts.batch * facts.tokens * heads);
  launch.threadgroups = {static_cast<uint32_t>(ceil_div(count, rope_cache_simdgroups())), 1, 1};
  const auto given = [](bool is_given, Role role) { return is_given ? Argument{role} : Argument{}; };
  set_arguments(
      launch,
      {{Role::x},
       given(facts.has_bias, Role::bias),
       given(facts.query_norm_heads > 0, Role::query_norm),
       given(facts.key_norm_heads > 0, Role::key_norm),
       given(has_angles, Role::cosines),
       given(has_angles, Role::sines),
       {Role::keys},
       {Role::values},
       {Role::y}});
  const auto checked = [&](const char* what, int64_t size) { return checked_int(op, what, size); };
  const RopeCacheParams params{
      count,
      checked("the number of tokens", facts.tokens),
      checked("the number of query heads", facts.query_heads),
      checked("the number of key heads", facts.key_heads),
      static_cast<int>(facts.query_norm_heads),
      static_cast<int>(facts.key_norm_heads),
      checked("the head size", facts.dim),
      static_cast<int>(facts.rotated),
      checked("the capacity of keys", facts.capacity),
      static_cast<int>(facts.position),
      static_cast<int>(facts.has_angles_of_sequences),
      static_cast<float>(std::bit_cast<double>(facts.epsilon))};
  set_params(launch, params, 9);
  return {{launch}, 0};
}

}  // namespace quantization_mlx::gpu
