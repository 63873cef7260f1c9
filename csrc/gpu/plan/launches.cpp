#include "launches.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../kernels.h"

namespace quantization_mlx::gpu {
namespace {

// --- The table of kernels ------------------------------------------------------------------------------------------

// A kernel of any type and format: % stands for them in its name, TYPE and FORMAT in its instance.
struct KernelRow {
  const char* name;
  const char* instance;
};

struct KernelTable {
  const char* file;
  std::optional<bool> column_packed;  // none: of every format
  std::vector<KernelRow> kernels;
};

#define ROW(name, ...) {name, #__VA_ARGS__},
#define ROWS(KERNELS) KERNELS(ROW, "", "%", TYPE, FORMAT)

const std::vector<KernelTable>& kernel_tables() {
  static const std::vector<KernelTable> all{
      {"matvec", false, {ROWS(MATVEC_KERNELS_rows)}},
      {"matvec", true, {ROWS(MATVEC_KERNELS_columns)}},
      {"matmul", false, {ROWS(MATMUL_KERNELS_rows)}},
      {"matmul", true, {ROWS(MATMUL_KERNELS_columns)}},
      {"matmul_tensor", false, {ROWS(TENSOR_KERNELS_rows)}},
      {"matmul_tensor", true, {ROWS(TENSOR_KERNELS_columns)}},
      {"quantize", false, {ROWS(QUANTIZE_KERNELS_rows)}},
      {"quantize", true, {ROWS(QUANTIZE_KERNELS_columns)}},
      {"sum_parts", std::nullopt, {SUM_KERNELS(ROW, "%", TYPE)}},
      {"sort_pairs", std::nullopt, {PAIR_KERNELS(ROW)}},
      {"norm", std::nullopt, {NORM_KERNELS(ROW, "%", TYPE)}},
      {"rope_into_cache", std::nullopt, {ROPE_CACHE_KERNELS(ROW, "%", TYPE)}},
      {"rope", std::nullopt, {ROPE_KERNELS(ROW, "%", TYPE)}},
      {"gates", std::nullopt, {GATE_KERNELS(ROW, "%", TYPE)}},
      {"attention", std::nullopt, {ATTENTION_KERNELS(ROW, "%", TYPE)}},
      {"attention_tile",
       std::nullopt,
       {ATTENTION_TILE_KERNELS(ROW, "%", TYPE) ATTENTION_TILE_HALF_KERNELS(ROW, "%", TYPE)}},
      {"attention_tensor", std::nullopt, {ATTENTION_TENSOR_KERNELS(ROW, "%", TYPE)}},
      {"sample", std::nullopt, {SAMPLE_KERNELS(ROW, "%", TYPE)}},
      {"moe", std::nullopt, {MOE_KERNELS(ROW, "%", TYPE) MOE_HALF_KERNELS(ROW, "%", TYPE)}},
      {"image", std::nullopt, {IMAGE_KERNELS(ROW, "%", TYPE)}}};
  return all;
}

#undef ROWS
#undef ROW

std::string replaced(std::string text, std::string_view place, const std::string& content) {
  for (size_t at = text.find(place); at != std::string::npos; at = text.find(place, at + content.size())) {
    text.replace(at, place.size(), content);
  }
  return text;
}

const char* name_of(at::ScalarType dtype) {
  return dtype == at::kHalf    ? "float16"
      : dtype == at::kBFloat16 ? "bfloat16"
      : dtype == at::kByte     ? "uint8"
                               : "float32";
}

// Of a type in Metal's language.
const char* metal_name_of(at::ScalarType dtype) {
  return dtype == at::kHalf ? "half" : dtype == at::kBFloat16 ? "bfloat" : dtype == at::kByte ? "uchar" : "float";
}

}  // namespace

bool KernelInstance::has_format() const {
  return std::string_view(instance_pattern).find("FORMAT") != std::string_view::npos;
}

std::string KernelInstance::name() const {
  const std::string type = std::string("_") + name_of(static_cast<at::ScalarType>(dtype));
  if (!has_format()) {  // sum_parts_float16, of sum_parts%
    return replaced(name_pattern, "%", type);
  }
  const std::string middle = c10::str(type, "_gs_", format.group_size, "_b_", format.bits);
  return c10::str(quantization_mlx::name_of(format.mode), "_", replaced(name_pattern, "%", middle));
}

std::string KernelInstance::instance() const {
  const std::string format_arguments =
      c10::str("Mode::", quantization_mlx::name_of(format.mode), ", ", format.group_size, ", ", format.bits);
  const char* type = metal_name_of(static_cast<at::ScalarType>(dtype));
  return replaced(replaced(instance_pattern, "TYPE", type), "FORMAT", format_arguments);
}

Launch launch_of(Family family, const std::string& op, int rows, Format format, int32_t dtype) {
  const bool columns = is_column_packed(format.mode);
  const std::string name = op + "%" + (rows > 1 ? "_rows_" + std::to_string(rows) : "");
  for (const KernelTable& table : kernel_tables()) {
    for (const KernelRow& row : table.kernels) {
      // Of no type, a kernel has the name of its op alone.
      if (table.column_packed.value_or(columns) == columns && (row.name == name || row.name == op)) {
        Launch launch;
        launch.kernel = {table.file, row.name, row.instance, format, dtype, 0, 0};
        launch.family = family;
        return launch;
      }
    }
  }
  TORCH_INTERNAL_ASSERT(false, "kernels.h has no ", name);
}

#define NAME(name) #name,

#define NAME(name) #name,

const char* name_of(Family family) {
  constexpr const char* names[] = {QUANTIZATION_MLX_FAMILIES(NAME)};
  return names[static_cast<int>(family)];
}

const char* name_of(Role role) {
  constexpr const char* names[role_count] = {QUANTIZATION_MLX_ROLES(NAME)};
  return names[static_cast<int>(role)];
}

#undef NAME

std::string no_family_left(std::string_view op, const Target& target) {
  return c10::str(
      "[", op, "] every kernel family that could serve failed its self-check on this GPU (", target.gpu.architecture,
      ").");
}

int checked_int(std::string_view op, const char* what, int64_t size) {
  TORCH_CHECK_NOT_IMPLEMENTED(size <= max_size, "[", op, "] ", what, " is ", size, "; on Metal it must be below 2^30.");
  return static_cast<int>(size);
}

void set_arguments(Launch& launch, std::initializer_list<Argument> arguments) {
  std::copy(arguments.begin(), arguments.end(), launch.arguments.begin());
  launch.argument_count = static_cast<int>(arguments.size());
}

bool is_aligned(const OperandFacts& operand, int64_t elements, int64_t bytes) {
  return (operand.misalignment + elements * operand.element_size) % bytes == 0;
}

int load_bytes(Format format) {
  if (is_column_packed(format.mode)) {
    return 4 * column_qvm_lane_columns();
  }
  return format.bits % 4 == 0 ? 16 : (format.bits % 2 == 0 ? 8 : 4);
}

}  // namespace quantization_mlx::gpu
