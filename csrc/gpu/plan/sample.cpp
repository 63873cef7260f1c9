// Plans of sampling: a threadgroup for each row.
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>

#include "launches.h"

namespace quantization_mlx::gpu {
namespace {

bool is_aligned(const SampleFacts& facts) {
  const auto bytes = static_cast<int64_t>(at::elementSize(static_cast<at::ScalarType>(facts.dtype)));
  return !facts.is_misaligned && facts.vocabulary % sample_elements() == 0 && facts.row_stride * bytes % 16 == 0;
}

}  // namespace

Plan plan(const SampleFacts& facts, std::string_view op, const Target& target) {
  TORCH_CHECK(!target.excluded.contains(Family::sample), no_family_left(op, target));
  const int rows = checked_int(op, "the number of rows", facts.rows);
  const int vocabulary = checked_int(op, "the number of tokens", facts.vocabulary);
  const int previous = checked_int(op, "the number of previous tokens", facts.previous);
  const bool penalises = previous > 0;
  Launch launch = launch_of(Family::sample, "sample", 1, Format{}, facts.dtype);
  launch.kernel.constants = constant(QUANTIZATION_MLX_ALIGNED_X, is_aligned(facts)) |
      constant(QUANTIZATION_MLX_HAS_SEEDS, facts.has_seeds) | constant(QUANTIZATION_MLX_HAS_PREVIOUS, penalises);
  launch.kernel.threads =
      static_cast<uint32_t>(std::min<int64_t>(sample_max_threads(), ceil_div(vocabulary, sample_step()) * 32));
  launch.threadgroups = {static_cast<uint32_t>(rows), 1, 1};
  const auto given = [](bool is_given, Role role) { return is_given ? Argument{role} : Argument{}; };
  set_arguments(
      launch,
      {{Role::x},
       given(facts.has_seeds, Role::seeds),
       given(penalises, Role::previous),
       given(penalises, Role::workspace),
       {Role::y},
       {Role::numbers}});
  set_params(
      launch,
      SampleParams{
          facts.row_stride, facts.top_p, facts.has_row_seeds, vocabulary, previous, static_cast<int>(facts.top_k),
          static_cast<int>(facts.farthest), std::bit_cast<float>(facts.scale), std::bit_cast<float>(facts.penalty)},
      6);
  // A bit for each token, whether it is penalised.
  return {{launch}, penalises ? facts.rows * ceil_div(vocabulary, 32) : 0};
}

}  // namespace quantization_mlx::gpu
