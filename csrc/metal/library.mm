#include "library.h"

#include <ATen/mps/MPSDevice.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>

#include "device.h"

#ifdef EMBEDDED_METALLIB_HEADER
#include EMBEDDED_METALLIB_HEADER
#else
#include "shader_source.h"
#endif

namespace quantization_mlx::metal {
namespace {

using gpu::Launch;

// MTLLibrary and pipelines are made once and never freed: the caches own them.
template <typename Object>
using Cache = std::unordered_map<std::string, Object>;

const char* text_of(NSError* error) {
  return error != nil ? error.localizedDescription.UTF8String : "Metal gives no reason";
}

#ifdef EMBEDDED_METALLIB_HEADER

// kernel-builder compiles all of metal/ into one library.
id<MTLLibrary> library(const Launch&) {
  static id<MTLLibrary> library = nil;
  if (library == nil) {
    NSError* error = nil;
    library = EMBEDDED_METALLIB_NAMESPACE::createLibrary(at::mps::MPSDevice::getInstance()->device(), &error);
    TORCH_CHECK(
        library != nil,
        "[quantization_mlx] macOS does not load the compiled shaders, which are for macOS 26 and later (the "
        "pip package compiles its own): ",
        text_of(error));
  }
  return library;
}

#else

// The newest that this release of macOS compiles. As numbers: an older SDK does not have the newer names.
MTLLanguageVersion language_version() {
  const int macos = macos_version();
  const auto version = [](NSUInteger major, NSUInteger minor) {
    return static_cast<MTLLanguageVersion>(major << 16 | minor);
  };
  return macos >= 2600 ? version(4, 0) : (macos >= 1500 ? version(3, 2) : version(3, 1));
}

MTLCompileOptions* compile_options() {
  MTLCompileOptions* options = [[MTLCompileOptions new] autorelease];
  options.languageVersion = language_version();
  // Infinity and NaN are values that weights and results may have.
  if (__builtin_available(macOS 15.0, *)) {
    options.mathMode = MTLMathModeSafe;
    options.mathFloatingPointFunctions = MTLMathFloatingPointFunctionsPrecise;
  } else {
    options.fastMathEnabled = NO;
  }
  return options;
}

// The templates of a file and the one instance that is the kernel: all instances would take minutes to compile.
std::string source_of(const Launch& launch) {
  const auto* end = shader_sources + shader_source_count;
  const auto* found = std::find_if(
      shader_sources, end, [&](const ShaderSource& source) { return std::string_view(source.file) == launch.file; });
  TORCH_INTERNAL_ASSERT(found != end, "no shader source ", launch.file);
  const std::string instance = launch.instance();
  return c10::str(
      found->text, "\nnamespace quantization_mlx {\ntemplate [[host_name(\"", launch.kernel,
      "\")]] [[kernel]] decltype(", instance, ") ", instance, ";\n}\n");
}

id<MTLLibrary> library(const Launch& launch) {
  static auto* libraries = new Cache<id<MTLLibrary>>;
  id<MTLLibrary>& entry = (*libraries)[launch.kernel];
  if (entry == nil) {
    NSError* error = nil;
    entry = [at::mps::MPSDevice::getInstance()->device()
        newLibraryWithSource:[NSString stringWithUTF8String:source_of(launch).c_str()]
                     options:compile_options()
                       error:&error];
    TORCH_CHECK(
        entry != nil, "[quantization_mlx] Metal does not compile ", launch.kernel, " of ", launch.file, ".metal:\n",
        text_of(error));
  }
  return entry;
}

#endif

// A kernel ignores those that it does not use.
constexpr int constant_count = QUANTIZATION_MLX_HAS_GLOBAL_SCALE + 1;

MTLFunctionConstantValues* constant_values(uint32_t constants) {
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues new] autorelease];
  for (int i = 0; i < constant_count; ++i) {
    const bool value = constants >> i & 1u;
    [values setConstantValue:&value type:MTLDataTypeBool atIndex:i];
  }
  return values;
}

id<MTLComputePipelineState> new_pipeline(const Launch& launch) {
  NSError* error = nil;
  id<MTLFunction> function = [[library(launch) newFunctionWithName:[NSString stringWithUTF8String:launch.kernel.c_str()]
                                                    constantValues:constant_values(launch.constants)
                                                             error:&error] autorelease];
  TORCH_CHECK(function != nil, "[quantization_mlx] there is no shader ", launch.kernel, ": ", text_of(error));
  id<MTLComputePipelineState> state =
      [at::mps::MPSDevice::getInstance()->device() newComputePipelineStateWithFunction:function error:&error];
  TORCH_CHECK(
      state != nil, "[quantization_mlx] Metal makes no pipeline of shader ", launch.kernel, ": ", text_of(error));
  if (state.maxTotalThreadsPerThreadgroup < launch.threads) {
    const NSUInteger threads = state.maxTotalThreadsPerThreadgroup;
    [state release];
    TORCH_CHECK(
        false, "[quantization_mlx] shader ", launch.kernel, " runs with at most ", threads,
        " threads in a threadgroup on this GPU and needs ", launch.threads, ".");
  }
  return state;
}

}  // namespace

id<MTLComputePipelineState> pipeline(const Launch& launch) {
  static std::mutex mutex;
  static auto* pipelines = new Cache<id<MTLComputePipelineState>>;
  // The name tells everything about a kernel but its function constants.
  const std::string key = launch.kernel + " " + std::to_string(launch.constants);
  const std::lock_guard lock(mutex);
  id<MTLComputePipelineState>& entry = (*pipelines)[key];
  if (entry == nil) {
    @autoreleasepool {
      entry = new_pipeline(launch);
    }
  }
  return entry;
}

}  // namespace quantization_mlx::metal
