// The shaders' source, for builds without a compiled library. cmake/embed_shaders.cmake writes the tables.
#pragma once

#include <cstddef>

namespace quantization_mlx::metal {

// The templates of a .metal file, with the project's own headers in the place of their #include.
struct ShaderSource {
  const char* file;  // stem of its name
  const char* text;
};

extern const ShaderSource shader_sources[];
extern const std::size_t shader_source_count;

}  // namespace quantization_mlx::metal
