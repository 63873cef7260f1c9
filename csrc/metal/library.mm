#include "library.h"

#include <ATen/mps/MPSDevice.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "device.h"
#include "shader_source.h"

#ifdef EMBEDDED_METALLIB_HEADER
#include EMBEDDED_METALLIB_HEADER
#endif

namespace quantization_mlx::metal {
namespace {

using gpu::KernelInstance;

const char* text_of(NSError* error) {
  return error != nil ? error.localizedDescription.UTF8String : "Metal gives no reason";
}

id<MTLDevice> device() { return at::mps::MPSDevice::getInstance()->device(); }

// --- Libraries -----------------------------------------------------------------------------------------------------

// The library that was compiled beforehand: embedded by kernel-builder, or a file beside the extension, of a wheel. Nil
// where there is none, or this release of macOS does not load it: all kernels are then compiled here.
id<MTLLibrary> compiled_library() {
  NSError* error = nil;
#ifdef EMBEDDED_METALLIB_HEADER
  return EMBEDDED_METALLIB_NAMESPACE::createLibrary(device(), &error);
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
  id<MTLLibrary> library = [device() newLibraryWithData:data error:&error];
  [data release];
  return library;
#endif
}

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
std::string source_of(const KernelInstance& kernel) {
  const std::string instance = kernel.instance();
  return c10::str(
      shader_source(kernel.file), "\nnamespace quantization_mlx {\ntemplate [[host_name(\"", kernel.name(),
      "\")]] [[kernel]] decltype(", instance, ") ", instance, ";\n}\n");
}

id<MTLLibrary> new_library(const KernelInstance& kernel) {
  NSError* error = nil;
  id<MTLLibrary> library = [device() newLibraryWithSource:[NSString stringWithUTF8String:source_of(kernel).c_str()]
                                                  options:compile_options()
                                                    error:&error];
  TORCH_CHECK(
      library != nil, "[quantization_mlx] Metal does not compile ", kernel.name(), " of ", kernel.file, ".metal:\n",
      text_of(error));
  return library;
}

// --- What is made once for each GPU --------------------------------------------------------------------------------

// One object by its key, made by the first thread that asks: others wait for this one alone.
template <typename Object>
class Cache {
 public:
  template <typename Make>
  Object get(const KernelInstance& key, const Make& make) {
    Entry& entry = entry_of(key);
    const std::lock_guard lock(entry.mutex);
    if (entry.object == nil) {
      @autoreleasepool {
        entry.object = make();
      }
    }
    return entry.object;
  }

 private:
  struct Entry {
    std::mutex mutex;
    Object object = nil;
  };

  Entry& entry_of(const KernelInstance& key) {
    const std::lock_guard lock(mutex_);
    std::unique_ptr<Entry>& entry = entries_[key];
    if (entry == nullptr) {
      entry = std::make_unique<Entry>();
    }
    return *entry;
  }

  std::mutex mutex_;
  std::unordered_map<KernelInstance, std::unique_ptr<Entry>, gpu::Bytewise, gpu::Bytewise> entries_;
};

struct Shaders {
  std::once_flag loaded;
  id<MTLLibrary> compiled = nil;
  Cache<id<MTLLibrary>> libraries;
  Cache<id<MTLComputePipelineState>> pipelines;
};

// Never freed.
Shaders& shaders() {
  static std::mutex mutex;
  static auto* by_gpu = new std::map<const void*, std::unique_ptr<Shaders>>;
  const std::lock_guard lock(mutex);
  std::unique_ptr<Shaders>& found = (*by_gpu)[current_gpu()];
  if (found == nullptr) {
    found = std::make_unique<Shaders>();
  }
  return *found;
}

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
  id<MTLComputePipelineState> state = [device() newComputePipelineStateWithFunction:function_of(kernel) error:&error];
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
  for (const gpu::Launch& launch : result.plan.launches) {
    const KernelInstance& kernel = launch.kernel;
    result.pipelines.push_back(shaders().pipelines.get(kernel, [&] { return new_pipeline(kernel); }));
  }
  return result;
}

}  // namespace quantization_mlx::metal
