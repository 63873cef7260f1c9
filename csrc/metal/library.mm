#include "library.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <string>
#include <utility>

#include "compile.h"
#include "once.h"
#include "shader_source.h"

#ifdef EMBEDDED_METALLIB_HEADER
#include EMBEDDED_METALLIB_HEADER
#endif

namespace quantization_mlx::metal {
namespace {

using gpu::KernelInstance;

// --- Libraries -----------------------------------------------------------------------------------------------------

// The library that was compiled beforehand: embedded by kernel-builder, or a file beside the extension, of a wheel. Nil
// where there is none, or this release of macOS does not load it: all kernels are then compiled here.
id<MTLLibrary> compiled_library() {
  NSError* error = nil;
#ifdef EMBEDDED_METALLIB_HEADER
  return EMBEDDED_METALLIB_NAMESPACE::createLibrary(mtl_device(), &error);
#else
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&compiled_library), &info) == 0) {
    return nil;
  }
  const auto path = std::filesystem::path(info.dli_fname).replace_filename("quantization_mlx.metallib");
  if (!std::filesystem::exists(path)) {
    return nil;
  }
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  dispatch_data_t data = dispatch_data_create(bytes.data(), bytes.size(), nil, DISPATCH_DATA_DESTRUCTOR_DEFAULT);
  id<MTLLibrary> library = [mtl_device() newLibraryWithData:data error:&error];
  [data release];
  return library;
#endif
}

// The templates of a file and the one instance that is the kernel: all instances would take minutes to compile.
std::string source_of(const KernelInstance& kernel) {
  const std::string instance = kernel.instance();
  return c10::str(
      shader_source(kernel.file), "\nnamespace quantization_mlx {\ntemplate [[host_name(\"", kernel.name(),
      "\")]] [[kernel]] decltype(", instance, ") ", instance, ";\n}\n");
}

// In safe math: infinity and NaN are values that weights and results may have.
id<MTLLibrary> new_library(const KernelInstance& kernel) {
  NSError* error = nil;
  id<MTLLibrary> library = [mtl_device() newLibraryWithSource:[NSString stringWithUTF8String:source_of(kernel).c_str()]
                                                      options:compile_options("safe")
                                                        error:&error];
  TORCH_CHECK(
      library != nil, "[quantization_mlx] Metal does not compile ", kernel.name(), " of ", kernel.file, ".metal:\n",
      text_of(error));
  return library;
}

// --- What is made once for each GPU --------------------------------------------------------------------------------

template <typename Object>
using Cache = Once<KernelInstance, Object, gpu::Bytewise, gpu::Bytewise>;

struct Shaders {
  std::once_flag loaded;
  id<MTLLibrary> compiled = nil;
  Cache<id<MTLLibrary>> libraries;
  Cache<id<MTLComputePipelineState>> pipelines;
};

Shaders& shaders() { return of_current_gpu<Shaders>(); }

// A kernel ignores the constants that it does not use.
void set_constants(MTLFunctionConstantValues* values, uint32_t constants) {
  for (int i = 0; i < QUANTIZATION_MLX_CONSTANTS; ++i) {
    const bool value = constants >> i & 1u;
    [values setConstantValue:&value type:MTLDataTypeBool atIndex:i];
  }
}

id<MTLFunction> new_function(id<MTLLibrary> library, const KernelInstance& kernel, NSError** error) {
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues new] autorelease];
  set_constants(values, kernel.constants);
  return [[library newFunctionWithName:[NSString stringWithUTF8String:kernel.name().c_str()]
                        constantValues:values
                                 error:error] autorelease];
}

id<MTLFunction> function_of(const KernelInstance& kernel) {
  Shaders& known = shaders();
  std::call_once(known.loaded, [&] { known.compiled = compiled_library(); });
  NSError* error = nil;
  if (known.compiled != nil) {
    if (id<MTLFunction> function = new_function(known.compiled, kernel, &error)) {
      return function;
    }
  }
  KernelInstance any = kernel;  // with any constants
  any.constants = 0;
  any.threads = 0;
  id<MTLLibrary> library = known.libraries.get(any, [&] { return new_library(kernel); });
  id<MTLFunction> function = new_function(library, kernel, &error);
  TORCH_CHECK(function != nil, "[quantization_mlx] there is no shader ", kernel.name(), ": ", text_of(error));
  return function;
}

id<MTLComputePipelineState> new_pipeline(const KernelInstance& kernel) {
  NSError* error = nil;
  id<MTLComputePipelineState> state = [mtl_device() newComputePipelineStateWithFunction:function_of(kernel)
                                                                                  error:&error];
  TORCH_CHECK(
      state != nil, "[quantization_mlx] Metal makes no pipeline of shader ", kernel.name(), ": ", text_of(error));
  if (state.maxTotalThreadsPerThreadgroup < kernel.threads) {
    const NSUInteger threads = state.maxTotalThreadsPerThreadgroup;
    [state release];
    TORCH_CHECK(
        false, "[quantization_mlx] shader ", kernel.name(), " runs with at most ", threads,
        " threads in a threadgroup on this GPU and needs ", kernel.threads, ".");
  }
  return state;
}

}  // namespace

PreparedPlan prepared(gpu::Plan plan) {
  PreparedPlan result{std::move(plan), {}};
  @autoreleasepool {
    for (const gpu::Launch& launch : result.plan.launches) {
      const KernelInstance& kernel = launch.kernel;
      result.pipelines.push_back(shaders().pipelines.get(kernel, [&] { return new_pipeline(kernel); }));
    }
  }
  return result;
}

}  // namespace quantization_mlx::metal
