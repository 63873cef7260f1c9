#include "launches.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "../kernels.h"

namespace quantization_mlx::gpu {
namespace {

// --- The table of kernels ------------------------------------------------------------------------------------------

// A kernel of any type and format: % stands for them in its name, TYPE and FORMAT in its instance.
struct KernelRow {
  std::string_view name;
  const char* instance;
};

struct KernelTable {
  const char* file;
  bool column_packed;
  std::vector<KernelRow> kernels;
};

#define ROW(name, ...) {name, #__VA_ARGS__},
#define ROWS(KERNELS) KERNELS(ROW, "", "%", TYPE, FORMAT)

const std::vector<KernelTable>& kernel_tables() {
  static const std::vector<KernelTable> all{
      {"matvec", false, {ROWS(MATVEC_KERNELS_rows) SUM_KERNELS(ROW, "%", TYPE)}},
      {"matvec", true, {ROWS(MATVEC_KERNELS_columns) SUM_KERNELS(ROW, "%", TYPE)}},
      {"matmul", false, {ROWS(MATMUL_KERNELS_rows)}},
      {"matmul", true, {ROWS(MATMUL_KERNELS_columns)}},
      {"matmul_tensor", false, {ROWS(TENSOR_KERNELS_rows)}},
      {"matmul_tensor", true, {ROWS(TENSOR_KERNELS_columns)}},
      {"quantize", false, {ROWS(QUANTIZE_KERNELS_rows)}},
      {"quantize", true, {ROWS(QUANTIZE_KERNELS_columns)}}};
  return all;
}

#undef ROWS
#undef ROW

bool has_format(std::string_view instance) { return instance.find("FORMAT") != std::string_view::npos; }

std::string replaced(std::string text, std::string_view place, const std::string& content) {
  for (size_t at = text.find(place); at != std::string::npos; at = text.find(place, at + content.size())) {
    text.replace(at, place.size(), content);
  }
  return text;
}

const char* name_of(at::ScalarType dtype) {
  return dtype == at::kHalf ? "float16" : dtype == at::kBFloat16 ? "bfloat16" : "float32";
}

// Of a type in Metal's language.
const char* metal_name_of(at::ScalarType dtype) {
  return dtype == at::kHalf ? "half" : dtype == at::kBFloat16 ? "bfloat" : "float";
}

// affine_qmv_float16_gs_64_b_4_rows_2, of qmv%_rows_2; sum_parts_float16, of sum_parts%.
std::string full_name(const KernelRow& kernel, Format format, at::ScalarType dtype) {
  std::string middle = std::string("_") + name_of(dtype);
  if (!has_format(kernel.instance)) {
    return replaced(std::string(kernel.name), "%", middle);
  }
  middle += "_gs_" + std::to_string(format.group_size) + "_b_" + std::to_string(format.bits);
  return std::string(quantization_mlx::name_of(format.mode)) + "_" + replaced(std::string(kernel.name), "%", middle);
}

}  // namespace

std::string Launch::instance() const {
  const std::string format_arguments =
      c10::str("Mode::", quantization_mlx::name_of(format.mode), ", ", format.group_size, ", ", format.bits);
  return replaced(replaced(pattern, "TYPE", metal_name_of(dtype)), "FORMAT", format_arguments);
}

Launch launch_of(Family family, const std::string& op, int rows, Format format, at::ScalarType dtype) {
  const std::string name = op + "%" + (rows > 1 ? "_rows_" + std::to_string(rows) : "");
  for (const KernelTable& table : kernel_tables()) {
    for (const KernelRow& kernel : table.kernels) {
      if (table.column_packed == is_column_packed(format.mode) && kernel.name == name) {
        Launch launch;
        launch.kernel = full_name(kernel, format, dtype);
        launch.file = table.file;
        launch.pattern = kernel.instance;
        launch.family = family;
        launch.format = format;
        launch.dtype = dtype;
        return launch;
      }
    }
  }
  TORCH_INTERNAL_ASSERT(false, "kernels.h has no ", name);
}

const char* name_of(Family family) {
  constexpr const char* names[] = {"tensor", "tile", "matvec", "quantize"};
  return names[static_cast<int>(family)];
}

const char* name_of(Role role) {
  constexpr const char* names[role_count] = {
      "none", "x", "w", "scales", "biases", "global_scale", "y", "partial_sums", "lhs_indices", "rhs_indices"};
  return names[static_cast<int>(role)];
}

int checked_int(std::string_view op, const char* what, int64_t size) {
  TORCH_CHECK_NOT_IMPLEMENTED(size <= max_size, "[", op, "] ", what, " is ", size, "; on Metal it must be below 2^30.");
  return static_cast<int>(size);
}

void set_arguments(Launch& launch, std::initializer_list<Argument> arguments) {
  std::copy(arguments.begin(), arguments.end(), launch.arguments.begin());
  launch.argument_count = static_cast<int>(arguments.size());
}

bool is_aligned(const at::Tensor& tensor, int64_t offset, int64_t bytes) {
  return (tensor.storage_offset() + offset) * static_cast<int64_t>(tensor.element_size()) % bytes == 0;
}

int load_bytes(Format format) {
  if (is_column_packed(format.mode)) {
    return 4 * column_qvm_lane_columns();
  }
  return format.bits % 4 == 0 ? 16 : (format.bits % 2 == 0 ? 8 : 4);
}

}  // namespace quantization_mlx::gpu
