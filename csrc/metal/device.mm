#include "device.h"

#import <Metal/Metal.h>

#include <ATen/mps/MPSDevice.h>
#include <dlfcn.h>

#include <map>
#include <mutex>

#include "../environment.h"

namespace quantization_mlx::metal {
namespace {

// From IOKit's registry, which Metal does not pass on; 0 where it is not told. Looked up by name, because Metal has
// loaded the framework and no build links it.
int core_count() {
  using Service = unsigned int;
  void* library = dlopen("/System/Library/Frameworks/IOKit.framework/IOKit", RTLD_LAZY);
  if (library == nullptr) {
    return 0;
  }
  const auto matching = reinterpret_cast<void* (*)(const char*)>(dlsym(library, "IOServiceMatching"));
  const auto find = reinterpret_cast<Service (*)(Service, void*)>(dlsym(library, "IOServiceGetMatchingService"));
  const auto property = reinterpret_cast<void* (*)(Service, void*, void*, unsigned int)>(
      dlsym(library, "IORegistryEntryCreateCFProperty"));
  const auto release = reinterpret_cast<int (*)(Service)>(dlsym(library, "IOObjectRelease"));
  if (matching == nullptr || find == nullptr || property == nullptr || release == nullptr) {
    return 0;
  }
  const Service gpu = find(0, matching("AGXAccelerator"));  // which takes the dictionary over
  if (gpu == 0) {
    return 0;
  }
  // A CFNumber is an NSNumber.
  NSNumber* count = [static_cast<NSNumber*>(property(gpu, @"gpu-core-count", nullptr, 0)) autorelease];
  release(gpu);
  return count != nil ? count.intValue : 0;
}

gpu::GpuTraits read_traits(id<MTLDevice> device) {
  if (const char* name = environment_variable("QUANTIZATION_MLX_GPU")) {
    return gpu::GpuTraits::parse(name, macos_version());
  }
  const char* name = device.architecture.name.UTF8String;
  return gpu::GpuTraits::of_device(name != nullptr ? name : "", macos_version(), core_count());
}

}  // namespace

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

const void* current_gpu() { return at::mps::MPSDevice::getInstance()->device(); }

const gpu::GpuTraits& gpu_traits() {
  static std::mutex mutex;
  static auto* known = new std::map<const void*, gpu::GpuTraits>;
  const std::lock_guard lock(mutex);
  const auto found = known->find(current_gpu());
  if (found != known->end()) {
    return found->second;
  }
  @autoreleasepool {
    id<MTLDevice> device = at::mps::MPSDevice::getInstance()->device();
    return known->emplace(device, read_traits(device)).first->second;
  }
}

}  // namespace quantization_mlx::metal
