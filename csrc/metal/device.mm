#include "device.h"

#import <Metal/Metal.h>

#include <ATen/mps/MPSDevice.h>

#include "../environment.h"

namespace quantization_mlx::metal {

int macos_version() {
  if (__builtin_available(macOS 26.2, *)) {
    return 2602;
  }
  if (__builtin_available(macOS 26.0, *)) {
    return 2600;
  }
  if (__builtin_available(macOS 15.0, *)) {
    return 1500;
  }
  return 1400;
}

gpu::GpuTraits gpu_traits() {
  if (const char* name = environment_variable("QUANTIZATION_MLX_GPU")) {
    return gpu::GpuTraits::parse(name, macos_version());
  }
  @autoreleasepool {
    const char* name = at::mps::MPSDevice::getInstance()->device().architecture.name.UTF8String;
    return gpu::GpuTraits::of_device(name != nullptr ? name : "", macos_version());
  }
}

}  // namespace quantization_mlx::metal
