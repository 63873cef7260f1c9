#include "shader_source.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <set>

// The files, by a name for the assembler, which copies their text into the extension. It looks for them where the
// compiler looks for headers: the project's folder has to be among these.
#define SHADER_FILES(FILE)                                           \
  FILE(format, "csrc/format.h")                                      \
  FILE(formats, "csrc/formats.h")                                    \
  FILE(functions, "csrc/functions.h")                                \
  FILE(gpu_kernels, "csrc/gpu/kernels.h")                            \
  FILE(launch, "csrc/gpu/launch.h")                                  \
  FILE(sampling, "csrc/sampling.h")                                  \
  FILE(resampling, "csrc/resampling.h")                              \
  FILE(activation, "metal/common/activation.h")                      \
  FILE(cooperative, "metal/common/cooperative.h")                    \
  FILE(instantiate, "metal/common/instantiate.h")                    \
  FILE(load, "metal/common/load.h")                                  \
  FILE(metal, "metal/common/metal.h")                                \
  FILE(polynomial, "metal/common/polynomial.h")                      \
  FILE(moe, "metal/fast/moe.h")                                      \
  FILE(moe_kernels, "metal/fast/moe.metal")                          \
  FILE(attention, "metal/fast/attention.h")                          \
  FILE(attention_kernels, "metal/fast/attention.metal")              \
  FILE(attention_nax, "metal/fast/attention_tensor.h")               \
  FILE(attention_nax_kernels, "metal/fast/attention_tensor.metal")   \
  FILE(attention_tile, "metal/fast/attention_tile.h")                \
  FILE(attention_tile_kernels, "metal/fast/attention_tile.metal")    \
  FILE(gates, "metal/fast/gates.h")                                  \
  FILE(gates_kernels, "metal/fast/gates.metal")                      \
  FILE(image, "metal/fast/image.h")                                  \
  FILE(image_kernels, "metal/fast/image.metal")                      \
  FILE(norm, "metal/fast/norm.h")                                    \
  FILE(norm_kernels, "metal/fast/norm.metal")                        \
  FILE(rope_into_cache, "metal/fast/rope_into_cache.h")              \
  FILE(rope_into_cache_kernels, "metal/fast/rope_into_cache.metal")  \
  FILE(sample, "metal/fast/sample.h")                                \
  FILE(sample_kernels, "metal/fast/sample.metal")                    \
  FILE(rope, "metal/fast/rope.h")                                    \
  FILE(rope_kernels, "metal/fast/rope.metal")                        \
  FILE(dequantize, "metal/quantized/dequantize.h")                   \
  FILE(quantized_formats, "metal/quantized/formats.h")               \
  FILE(matmul, "metal/quantized/matmul.h")                           \
  FILE(matmul_kernels, "metal/quantized/matmul.metal")               \
  FILE(matmul_tensor, "metal/quantized/matmul_tensor.h")             \
  FILE(matmul_tensor_kernels, "metal/quantized/matmul_tensor.metal") \
  FILE(matvec, "metal/quantized/matvec.h")                           \
  FILE(matvec_kernels, "metal/quantized/matvec.metal")               \
  FILE(matvec_columns, "metal/quantized/matvec_columns.h")           \
  FILE(operands, "metal/quantized/operands.h")                       \
  FILE(quantize, "metal/quantized/quantize.h")                       \
  FILE(quantize_kernels, "metal/quantized/quantize.metal")           \
  FILE(sort_pairs_kernels, "metal/quantized/sort_pairs.metal")       \
  FILE(sum_parts_kernels, "metal/quantized/sum_parts.metal")         \
  FILE(tile, "metal/quantized/tile.h")

#ifdef __APPLE__
#define SECTION "__TEXT,__const"
#define SYMBOL "_quantization_mlx_source_"
#else
#define SECTION ".rodata"
#define SYMBOL "quantization_mlx_source_"
#endif

#define EMBED(name, path)                                                                             \
  __asm__(".pushsection " SECTION "\n" SYMBOL #name ":\n.incbin \"" path "\"\n.byte 0\n.popsection"); \
  extern "C" const char quantization_mlx_source_##name[];
SHADER_FILES(EMBED)
#undef EMBED

namespace quantization_mlx::metal {
namespace {

struct File {
  std::string_view path;  // from the project's folder
  const char* text;
};

#define ROW(name, path) {path, quantization_mlx_source_##name},
const File files[] = {SHADER_FILES(ROW)};
#undef ROW

// "metal/common/metal.h", of "../common/metal.h" in metal/quantized/.
std::string resolved(std::string_view folder, std::string_view include) {
  constexpr std::string_view up = "../";
  while (include.substr(0, up.size()) == up) {
    include.remove_prefix(up.size());
    folder = folder.substr(0, folder.rfind('/') == std::string_view::npos ? 0 : folder.rfind('/'));
  }
  return folder.empty() ? std::string(include) : c10::str(folder, "/", include);
}

// Appends a file and what it includes but for what is in the result already.
void append(const std::string& path, bool with_instances, std::set<std::string>& seen, std::string& result) {
  if (!seen.insert(path).second) {
    return;
  }
  const auto* file = std::find_if(std::begin(files), std::end(files), [&](const File& f) { return f.path == path; });
  TORCH_INTERNAL_ASSERT(file != std::end(files), "no shader source ", path);
  constexpr std::string_view include = "#include \"";
  const std::string_view folder = std::string_view(path).substr(0, path.rfind('/'));
  const auto mark = [&](int line) { result += c10::str("#line ", line, " \"", path, "\"\n"); };
  std::string_view rest = file->text;
  mark(1);
  for (int number = 1; !rest.empty(); ++number) {
    const size_t end = std::min(rest.find('\n'), rest.size() - 1) + 1;
    const std::string_view line = rest.substr(0, end);
    rest.remove_prefix(end);
    if (line.substr(0, include.size()) == include) {
      const std::string_view name = line.substr(include.size());
      append(resolved(folder, name.substr(0, name.find('"'))), with_instances, seen, result);
      mark(number + 1);
    } else if (!with_instances && line.find("// --- Instances") == 0) {
      return;
    } else {
      result += line.find("#pragma once") == 0 ? "\n" : line;
    }
  }
}

std::string source_of(const File& file, bool with_instances) {
  std::set<std::string> seen;
  std::string result;
  append(std::string(file.path), with_instances, seen, result);
  return result;
}

}  // namespace

std::string shader_source(std::string_view stem) {
  const auto* file = std::find_if(std::begin(files), std::end(files), [&](const File& f) {
    const size_t name = f.path.rfind('/') + 1;
    return f.path.substr(name) == c10::str(stem, ".metal");
  });
  TORCH_INTERNAL_ASSERT(file != std::end(files), "no shader ", stem);
  return source_of(*file, /*with_instances=*/false);
}

std::vector<std::pair<std::string, std::string>> all_shader_sources() {
  constexpr std::string_view suffix = ".metal";
  std::vector<std::pair<std::string, std::string>> result;
  for (const File& file : files) {
    const size_t end = file.path.find(suffix);
    if (end != std::string_view::npos) {
      const size_t name = file.path.rfind('/') + 1;
      result.emplace_back(file.path.substr(name, end - name), source_of(file, /*with_instances=*/true));
    }
  }
  return result;
}

}  // namespace quantization_mlx::metal
