// Environment variables, as every part of the package reads them.
#pragma once

#include <cstdlib>

namespace quantization_mlx {

// The value of a variable; null where it is unset or empty, which mean the same.
inline const char* environment_variable(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

}  // namespace quantization_mlx
