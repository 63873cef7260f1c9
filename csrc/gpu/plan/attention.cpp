// Plans of attention.
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <limits>
#include <string>

#include "launches.h"

namespace quantization_mlx::gpu {
namespace {

// Instances of the vector form: the largest head sizes that they serve, and the most rows.
struct VectorForm {
  const char* kernel;
  int dim;
  int value_dim;
  int rows;
};
constexpr VectorForm vector_forms[] = {
    {"attention_64", 64, 64, 8},
    {"attention_128", 128, 128, 8},
    {"attention_256", 256, 256, 4},
    {"attention_576", 640, 512, 2}};

// Instances of the tiled form and of that on tensor operations: the largest head size that they serve, in elements and
// in bytes.
struct TileForm {
  const char* kernel;
  const char* tensor_kernel;
  int dim;
  int bytes;
};
constexpr TileForm tile_forms[] = {
    {"attention_tile_64", "attention_tile_nax_64", 64, 256},
    {"attention_tile_128", "attention_tile_nax_128", 128, 512},
    {"attention_tile_256", "attention_tile_nax_256", 256, 512}};
// The most queries of the vector form where there is a tile for them: its arithmetic is done by the lanes themselves.
constexpr int64_t vector_queries = 8;

// A core hides the latency of memory with about so many threadgroups of 128 threads; with fewer, the keys are cut up.
// Shorter parts than `least_part` cost more in partial sums than they gain.
constexpr int64_t threadgroups_per_core = 4;
constexpr int64_t least_part = 64;
constexpr int64_t part_multiple = 32;

class AttentionPlanner {
 public:
  AttentionPlanner(const AttentionFacts& facts, std::string_view op, const Target& target)
      : facts_(facts), op_(op), target_(target), group_(facts.query_heads / facts.key_heads) {
    checked_int(op, "the number of keys", facts.keys);
    checked_int(op, "queries times heads of q to each of k", facts.queries * group_);
    checked_int(op, "batch times heads", facts.batch * facts.query_heads);
  }

  Plan plan() && {
    const TileForm* form = tile_form();
    const bool has_tensor = form != nullptr && tensor_serves();
    const bool has_tile = has_tensor || (form != nullptr && !target_.excluded.contains(Family::tile));
    const bool has_vector = !target_.excluded.contains(Family::attention);
    TORCH_CHECK(has_tile || has_vector, no_family_left(op_, target_));
    if (has_tile && (facts_.queries > vector_queries || !has_vector)) {
      if (has_tensor) {
        tile(Family::tensor, form->tensor_kernel, attention_tensor_rows(form->dim));
      } else {
        tile(Family::tile, form->kernel, attention_tile_rows());
      }
    } else {
      vector();
    }
    return std::move(plan_);
  }

 private:
  int64_t element_bytes() const {
    return static_cast<int64_t>(at::elementSize(static_cast<at::ScalarType>(facts_.dtype)));
  }

  int64_t rows() const { return facts_.queries * group_; }

  // That any query sees.
  int64_t first_key() const {
    return facts_.has_window != 0
        ? std::clamp<int64_t>(facts_.keys - facts_.queries + 1 - facts_.window, 0, facts_.keys)
        : 0;
  }

  void vector() {
    const VectorForm form = *std::find_if(std::begin(vector_forms), std::end(vector_forms), [&](const auto& each) {
      return facts_.dim <= each.dim && facts_.value_dim <= each.value_dim;
    });
    const int instance = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::min<int64_t>(rows(), form.rows))));
    const int64_t blocks = ceil_div(rows(), instance);
    const int64_t threadgroups = blocks * facts_.batch * facts_.key_heads;
    const int64_t keys = facts_.keys - first_key();
    const int64_t wanted = target_.gpu.cores * threadgroups_per_core / threadgroups;
    const int64_t most = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(keys / least_part, 1));
    const int64_t part_keys = std::max(ceil_div(ceil_div(keys, most), part_multiple), int64_t{1}) * part_multiple;
    const int64_t parts = std::max<int64_t>(ceil_div(keys, part_keys), 1);

    Launch launch = launch_of(Family::attention, form.kernel, instance, Format{}, facts_.dtype);
    launch.kernel.constants = constants() | constant(QUANTIZATION_MLX_SPLIT_KEYS, parts > 1) |
        constant(QUANTIZATION_MLX_WHOLE_HEADS, facts_.dim == form.dim && facts_.value_dim == form.value_dim);
    launch.kernel.threads = 32u * attention_simdgroups();
    launch.threadgroups = {
        static_cast<uint32_t>(blocks), static_cast<uint32_t>(parts),
        static_cast<uint32_t>(facts_.batch * facts_.key_heads)};
    add(launch, params(parts, part_keys), parts > 1);
    if (parts > 1) {
      combine(parts);
    }
  }

  // Null where the head is too large.
  const TileForm* tile_form() const {
    const int64_t dim = std::max(facts_.dim, facts_.value_dim);
    const auto* found = std::find_if(std::begin(tile_forms), std::end(tile_forms), [&](const TileForm& form) {
      return dim <= form.dim && form.dim * element_bytes() <= form.bytes;
    });
    return found == std::end(tile_forms) ? nullptr : found;
  }

  // Tensor operations round float32, count in 32 bits within a block of keys, and read it where it lies: not packed.
  bool tensor_serves() const {
    const auto is_near = [&](const int64_t (&strides)[3]) {
      return strides[2] * attention_tensor_keys() * element_bytes() <= std::numeric_limits<int32_t>::max();
    };
    return target_.gpu.tensor_ops && !target_.excluded.contains(Family::tensor) &&
        static_cast<at::ScalarType>(facts_.dtype) != at::kFloat && !is_packed() && is_near(facts_.k_strides) &&
        is_near(facts_.v_strides);
  }

  void tile(Family family, const char* kernel, int block_rows) {
    Launch launch = launch_of(family, kernel, 1, Format{}, facts_.dtype);
    launch.kernel.constants = constants();
    launch.kernel.threads = 32u * attention_tile_simdgroups();
    launch.threadgroups = {
        static_cast<uint32_t>(ceil_div(rows(), block_rows)), 1, static_cast<uint32_t>(facts_.batch * facts_.key_heads)};
    add(launch, params(1, facts_.keys), false);
  }

  void add(Launch& launch, const AttentionParams& params, bool split) {
    const auto given = [](bool is_given, Role role) { return is_given ? Argument{role} : Argument{}; };
    set_arguments(
        launch,
        {{Role::queries},
         {Role::keys},
         {Role::values},
         given(facts_.has_bool_mask, Role::mask),
         given(facts_.has_added_mask, Role::mask),
         given(facts_.has_sinks, Role::sinks),
         {Role::y},
         given(split, Role::workspace),
         given(is_packed(), Role::key_scales),
         given(is_packed(), Role::key_biases),
         given(is_packed(), Role::value_scales),
         given(is_packed(), Role::value_biases)});
    set_params(launch, params, 12);
    plan_.launches.push_back(launch);
  }

  void combine(int64_t parts) {
    const int64_t count = facts_.batch * facts_.query_heads * facts_.queries;
    Launch launch = launch_of(Family::attention, "attention_combine", 1, Format{}, facts_.dtype);
    launch.kernel.constants = constant(QUANTIZATION_MLX_HAS_SINKS, facts_.has_sinks);
    launch.kernel.threads = 32u * attention_combine_simdgroups();
    launch.threadgroups = {
        static_cast<uint32_t>(ceil_div(facts_.value_dim, 32)),
        static_cast<uint32_t>(checked_int(op_, "batch times heads times queries", count)), 1};
    const Argument sinks = facts_.has_sinks ? Argument{Role::sinks} : Argument{};
    set_arguments(launch, {{Role::workspace}, sinks, {Role::y}});
    const AttentionCombineParams params{
        static_cast<int>(parts), static_cast<int>(facts_.value_dim), static_cast<int>(facts_.queries),
        static_cast<int>(facts_.query_heads)};
    set_params(launch, params, 3);
    plan_.launches.push_back(launch);
    plan_.workspace = count * parts * (facts_.value_dim + 2);
  }

  uint32_t constants() const {
    return constant(QUANTIZATION_MLX_ALIGNED_X, is_aligned()) | constant(QUANTIZATION_MLX_CAUSAL, facts_.causal) |
        constant(QUANTIZATION_MLX_HAS_BOOL_MASK, facts_.has_bool_mask) |
        constant(QUANTIZATION_MLX_HAS_ADDED_MASK, facts_.has_added_mask) |
        constant(QUANTIZATION_MLX_HAS_SINKS, facts_.has_sinks) | constant(QUANTIZATION_MLX_PACKED_KEYS, is_packed()) |
        constant(QUANTIZATION_MLX_EIGHT_BITS, facts_.bits == 8);
  }

  bool is_packed() const { return facts_.bits != 0; }

  // Whether every lane's elements begin at a multiple of what it loads at once, and end within a head.
  bool is_aligned() const {
    const auto whole = [](const int64_t (&strides)[3], int64_t bytes) {
      return std::all_of(
          std::begin(strides), std::end(strides), [&](int64_t stride) { return stride * bytes % 16 == 0; });
    };
    const int64_t key_bytes = is_packed() ? 4 : element_bytes();
    return facts_.is_misaligned == 0 && facts_.dim % 8 == 0 && facts_.value_dim % 8 == 0 &&
        whole(facts_.q_strides, element_bytes()) && whole(facts_.k_strides, key_bytes) &&
        whole(facts_.v_strides, key_bytes);
  }

  AttentionParams params(int64_t parts, int64_t part_keys) const {
    const auto strides = [](const auto& all) { return HeadStrides{all[0], all[1], all[2]}; };
    AttentionParams params{};
    params.q = strides(facts_.q_strides);
    params.k = strides(facts_.k_strides);
    params.v = strides(facts_.v_strides);
    params.k_scales = strides(facts_.k_scale_strides);
    params.v_scales = strides(facts_.v_scale_strides);
    params.mask = strides(facts_.mask_strides);
    params.mask_key_stride = facts_.mask_strides[3];
    params.key_heads = static_cast<int>(facts_.key_heads);
    params.group = static_cast<int>(group_);
    params.queries = static_cast<int>(facts_.queries);
    params.keys = static_cast<int>(facts_.keys);
    params.dim = static_cast<int>(facts_.dim);
    params.value_dim = static_cast<int>(facts_.value_dim);
    params.window = static_cast<int>(facts_.has_window != 0 ? std::min(facts_.window, max_size) : max_size);
    params.first_key = static_cast<int>(first_key());
    params.parts = static_cast<int>(parts);
    params.part_keys = static_cast<int>(part_keys);
    params.group_shift = is_packed() ? std::countr_zero(static_cast<uint32_t>(facts_.group_size)) : 0;
    params.scale = static_cast<float>(std::bit_cast<double>(facts_.scale));
    params.softcap = static_cast<float>(std::bit_cast<double>(facts_.softcap));
    return params;
  }

  const AttentionFacts& facts_;
  std::string_view op_;
  const Target& target_;
  int64_t group_;
  Plan plan_;
};

}  // namespace

Plan plan(const AttentionFacts& facts, std::string_view op, const Target& target) {
  return AttentionPlanner(facts, op, target).plan();
}

}  // namespace quantization_mlx::gpu
