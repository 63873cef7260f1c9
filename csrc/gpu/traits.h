// The GPUs that plans are made for.
#pragma once

#include <string>
#include <string_view>

namespace quantization_mlx::gpu {

struct GpuTraits {
  std::string architecture;  // as Metal names it: applegpu_g16s
  int generation = 0;  // 13 is M1, 14 M2, 15 M3, 16 M4, 17 M5
  char variant = 'g';  // p phone, g base, s Pro or Max, c Max, d Ultra
  int cores = 0;  // where they are not told, the usual number for the variant
  bool tensor_ops = false;  // matrix units and the language to use them
  int macos = 0;  // 2602 is 26.2

  // name: an architecture, with a slash and the number of cores where it is not the usual one: applegpu_g16s/16. Raises
  // ValueError where that is not one of an Apple GPU.
  static GpuTraits parse(std::string_view name, int macos);
  // cores: 0 where they are not told. Of a GPU with another name, such as a virtual one, nothing is assumed.
  static GpuTraits of_device(std::string_view architecture, int macos, int cores);
};

}  // namespace quantization_mlx::gpu
