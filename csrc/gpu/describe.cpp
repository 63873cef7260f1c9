#include "describe.h"

#include <algorithm>
#include <iterator>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

namespace quantization_mlx::gpu {
namespace {

std::string hexadecimal(const std::byte* bytes, int size) {
  constexpr char digits[] = "0123456789abcdef";
  std::string text;
  for (int i = 0; i < size; ++i) {
    const auto byte = static_cast<unsigned>(bytes[i]);
    text += {digits[byte >> 4], digits[byte & 15]};
  }
  return text;
}

}  // namespace

std::string describe(const Plan& plan, const Target& target) {
  constexpr std::pair<int, const char*> constants[] = {
      {QUANTIZATION_MLX_ALIGNED_OUTPUTS, "aligned_outputs"},
      {QUANTIZATION_MLX_ALIGNED_WEIGHTS, "aligned_weights"},
      {QUANTIZATION_MLX_ALIGNED_X, "aligned_x"},
      {QUANTIZATION_MLX_ALIGNED_K, "aligned_k"},
      {QUANTIZATION_MLX_HAS_GLOBAL_SCALE, "has_global_scale"},
      {QUANTIZATION_MLX_HAS_WEIGHT, "has_weight"},
      {QUANTIZATION_MLX_HAS_BIAS, "has_bias"},
      {QUANTIZATION_MLX_HAS_RESIDUAL, "has_residual"},
      {QUANTIZATION_MLX_HAS_QUERY_NORM, "has_query_norm"},
      {QUANTIZATION_MLX_HAS_KEY_NORM, "has_key_norm"},
      {QUANTIZATION_MLX_HAS_ANGLES, "has_angles"},
      {QUANTIZATION_MLX_HAS_SEEDS, "has_seeds"},
      {QUANTIZATION_MLX_HAS_PREVIOUS, "has_previous"},
      {QUANTIZATION_MLX_CAUSAL, "causal"},
      {QUANTIZATION_MLX_HAS_BOOL_MASK, "has_bool_mask"},
      {QUANTIZATION_MLX_HAS_ADDED_MASK, "has_added_mask"},
      {QUANTIZATION_MLX_HAS_SINKS, "has_sinks"},
      {QUANTIZATION_MLX_SPLIT_KEYS, "split_keys"},
      {QUANTIZATION_MLX_HAS_OFFSETS, "has_offsets"},
      {QUANTIZATION_MLX_HAS_FREQS, "has_freqs"},
      {QUANTIZATION_MLX_PACKED_KEYS, "packed_keys"},
      {QUANTIZATION_MLX_EIGHT_BITS, "eight_bits"},
      {QUANTIZATION_MLX_IS_GATED, "is_gated"},
      {QUANTIZATION_MLX_HAS_X_WEIGHT, "has_x_weight"},
      {QUANTIZATION_MLX_WHOLE_HEADS, "whole_heads"}};
  static_assert(std::size(constants) == QUANTIZATION_MLX_CONSTANTS);
  std::ostringstream out;
  const auto list = [&](const auto& items, const auto& write) {
    const char* separator = "";
    out << "[";
    for (const auto& item : items) {
      out << separator;
      write(item);
      separator = ", ";
    }
    out << "]";
  };
  const auto quoted = [&](std::string_view text) { out << '"' << text << '"'; };
  std::vector<Family> excluded;
  std::copy_if(std::begin(all_families), std::end(all_families), std::back_inserter(excluded), [&](Family family) {
    return target.excluded.contains(family);
  });
  out << "{\"device\": \"mps\", \"gpu\": \"" << target.gpu.architecture << "\", \"excluded\": ";
  list(excluded, [&](Family family) { quoted(name_of(family)); });
  out << ", \"workspace\": " << plan.workspace << ", \"launches\": ";
  list(plan.launches, [&](const Launch& launch) {
    std::vector<const char*> set;
    for (const auto& [index, name] : constants) {
      if (launch.kernel.constants >> index & 1u) {
        set.push_back(name);
      }
    }
    out << "{\"kernel\": ";
    quoted(launch.kernel.name());
    out << ", \"file\": ";
    quoted(launch.kernel.file);
    out << ", \"instance\": ";
    quoted(launch.kernel.instance());
    out << ", \"family\": ";
    quoted(name_of(launch.family));
    out << ", \"constants\": ";
    list(set, quoted);
    out << ", \"threadgroups\": ";
    list(launch.threadgroups, [&](uint32_t count) { out << count; });
    out << ", \"threads\": " << launch.kernel.threads << ", \"arguments\": ";
    const auto used = launch.arguments.begin() + launch.argument_count;
    list(std::vector<Argument>(launch.arguments.begin(), used), [&](const Argument& argument) {
      out << "[\"" << name_of(argument.role) << "\", " << argument.offset << "]";
    });
    out << ", \"params_index\": " << launch.params_index << ", \"params\": ";
    quoted(hexadecimal(launch.params.data(), launch.params_size));
    out << "}";
  });
  out << "}";
  return out.str();
}

}  // namespace quantization_mlx::gpu
