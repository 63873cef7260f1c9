// Plans of rope: a thread turns a few adjacent pairs of some heads at one position.
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>

#include "launches.h"

namespace quantization_mlx::gpu {
namespace {

// The fewest threads to a core while fewer heads can share angles instead: a core hides its loads behind the others'.
constexpr int64_t core_threads = 512;

bool is_aligned(const RopeFacts& facts) {
  const auto bytes = static_cast<int64_t>(at::elementSize(static_cast<at::ScalarType>(facts.dtype)));
  const auto whole = [&](int64_t elements) { return elements * bytes % 16 == 0; };
  return facts.misalignment == 0 && facts.pairs % rope_pairs() == 0 && facts.width % rope_pairs() == 0 &&
      whole(facts.sequence_stride) && whole(facts.head_stride) && whole(facts.position_stride);
}

// A double as the sum of two floats.
void split(double value, float (&parts)[2]) {
  parts[0] = static_cast<float>(value);
  parts[1] = static_cast<float>(value - parts[0]);
}

RopeParams rope_params(const RopeFacts& facts, std::string_view op) {
  constexpr double turn = 6.283185307179586477;
  RopeParams params{};
  params.sequence_stride = facts.sequence_stride;
  params.head_stride = facts.head_stride;
  params.position_stride = facts.position_stride;
  params.length = checked_int(op, "the number of positions", facts.length);
  params.heads = checked_int(op, "the number of heads", facts.heads);
  params.width = checked_int(op, "the last size of x", facts.width);
  params.pairs = static_cast<int>(facts.pairs);
  params.offset_words = facts.offset_size / 4;
  params.offset_stride = checked_int(op, "the stride of offset", facts.offset_stride * params.offset_words);
  split(std::bit_cast<double>(facts.scale) / turn, params.first);
  if (facts.has_freqs == 0) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        facts.pairs <= int64_t{1} << rope_max_bits(), "[", op, "] dims is ", 2 * facts.pairs,
        "; on Metal it must be at most ", 2 << rope_max_bits(), " with base.");
    for (int bit = 0; bit < rope_max_bits(); ++bit) {
      split(rope_power(std::bit_cast<double>(facts.base), facts.pairs, bit), params.powers[bit]);
    }
  }
  return params;
}

}  // namespace

Plan plan(const RopeFacts& facts, std::string_view op, const Target& target) {
  TORCH_CHECK(!target.excluded.contains(Family::rope), no_family_left(op, target));
  Launch launch =
      launch_of(Family::rope, facts.traditional != 0 ? "rope_traditional" : "rope", 1, Format{}, facts.dtype);
  launch.kernel.constants = constant(QUANTIZATION_MLX_ALIGNED_X, is_aligned(facts)) |
      constant(QUANTIZATION_MLX_HAS_OFFSETS, facts.offset_size > 0) |
      constant(QUANTIZATION_MLX_HAS_FREQS, facts.has_freqs);
  launch.kernel.threads = elementwise_threads_per_threadgroup();
  RopeParams params = rope_params(facts, op);
  const int64_t groups = ceil_div(facts.pairs, rope_pairs()) + ceil_div(facts.width - 2 * facts.pairs, rope_pairs());
  const int64_t threads = checked_int(op, "the number of pairs of all positions", groups * facts.length);
  params.thread_heads = rope_max_heads();
  while (params.thread_heads > 1 &&
         threads * facts.sequences * ceil_div(facts.heads, params.thread_heads) < core_threads * target.gpu.cores) {
    params.thread_heads /= 2;
  }
  launch.threadgroups = {
      static_cast<uint32_t>(ceil_div(threads, launch.kernel.threads)),
      static_cast<uint32_t>(ceil_div(facts.heads, params.thread_heads)),
      static_cast<uint32_t>(checked_int(op, "the number of sequences", facts.sequences))};
  const auto given = [](bool is_given, Role role) { return is_given ? Argument{role} : Argument{}; };
  set_arguments(
      launch,
      {{Role::x},
       given(facts.offset_size > 0, Role::offsets),
       given(facts.has_freqs != 0, Role::freqs),
       {Role::y},
       {Role::numbers}});
  set_params(launch, params, 5);
  return {{launch}, 0};
}

}  // namespace quantization_mlx::gpu
