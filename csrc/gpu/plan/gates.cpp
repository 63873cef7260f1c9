// Plans of gated activations: a few adjacent elements to a thread.
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>

#include "launches.h"

namespace quantization_mlx::gpu {
namespace {

bool is_aligned(const GateFacts& facts) {
  const auto bytes = static_cast<int64_t>(at::elementSize(static_cast<at::ScalarType>(facts.dtype)));
  const auto whole = [&](int64_t elements) { return elements * bytes % 16 == 0; };
  return facts.is_misaligned == 0 && facts.gates_stride == 1 && facts.values_stride == 1 &&
      facts.gate_bias_stride == 1 && facts.value_bias_stride == 1 && facts.length % gate_elements() == 0 &&
      whole(facts.gates_row_stride) && whole(facts.values_row_stride) && whole(facts.gate_bias_row_stride) &&
      whole(facts.value_bias_row_stride);
}

float number(int64_t bits) { return static_cast<float>(std::bit_cast<double>(bits)); }

}  // namespace

Plan plan(const GateFacts& facts, std::string_view op, const Target& target) {
  constexpr const char* kernels[] = {"swiglu", "geglu", "geglu_tanh"};
  TORCH_CHECK(!target.excluded.contains(Family::gate), no_family_left(op, target));
  Launch launch = launch_of(Family::gate, kernels[facts.kind], 1, Format{}, facts.dtype);
  const bool has_bias = facts.experts > 0;
  launch.kernel.constants =
      constant(QUANTIZATION_MLX_ALIGNED_X, is_aligned(facts)) | constant(QUANTIZATION_MLX_HAS_BIAS, has_bias);
  const int length = checked_int(op, "the last size of gates", facts.length);
  const int rows = checked_int(op, "the number of rows", facts.rows);
  const int64_t threads = ceil_div(length, gate_elements());
  launch.kernel.threads =
      static_cast<uint32_t>(std::min<int64_t>(elementwise_threads_per_threadgroup(), ceil_div(threads, 32) * 32));
  launch.threadgroups = {
      static_cast<uint32_t>(ceil_div(threads, launch.kernel.threads)), static_cast<uint32_t>(rows), 1};
  const auto with_bias = [&](Role role) { return has_bias ? Argument{role} : Argument{}; };
  set_arguments(
      launch,
      {{Role::gates},
       {Role::values},
       with_bias(Role::bias),
       with_bias(Role::value_bias),
       with_bias(Role::experts),
       {Role::y}});
  set_params(
      launch,
      GateParams{
          facts.gates_row_stride, facts.gates_stride, facts.values_row_stride, facts.values_stride,
          facts.gate_bias_row_stride, facts.gate_bias_stride, facts.value_bias_row_stride, facts.value_bias_stride,
          facts.experts, length, number(facts.alpha), number(facts.limit), number(facts.offset)},
      6);
  return {{launch}, 0};
}

}  // namespace quantization_mlx::gpu
