// The shaders' source, which is part of the extension.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace quantization_mlx::metal {

// A .metal file of this stem, up to its line "// --- Instances": Metal has no path for headers when it compiles at run
// time, so the project's own stand in the place of their #include, each once, with #line markers between them.
std::string shader_source(std::string_view stem);

// All .metal files by stem, with their instances.
std::vector<std::pair<std::string, std::string>> all_shader_sources();

}  // namespace quantization_mlx::metal
