#include "compile.h"

#include <ATen/mps/MPSDevice.h>
#include <c10/util/Exception.h>

#include "device.h"

namespace quantization_mlx::metal {
namespace {

MTLLanguageVersion language_version() {
  const int macos = macos_version();
  // As numbers: an older SDK does not have the newer names.
  const auto version = [](NSUInteger major, NSUInteger minor) {
    return static_cast<MTLLanguageVersion>(major << 16 | minor);
  };
  return macos >= 2600 ? version(4, 0) : (macos >= 1500 ? version(3, 2) : version(3, 1));
}

}  // namespace

id<MTLDevice> mtl_device() { return at::mps::MPSDevice::getInstance()->device(); }

const char* text_of(NSError* error) {
  return error != nil ? error.localizedDescription.UTF8String : "Metal gives no reason";
}

MTLCompileOptions* compile_options(std::string_view math_mode) {
  const bool is_safe = math_mode == "safe";
  const bool is_fast = math_mode == "fast";
  TORCH_CHECK_VALUE(
      is_safe || is_fast || math_mode == "relaxed", "math_mode is '", math_mode,
      "'; supported are 'safe', 'relaxed' and 'fast'");
  MTLCompileOptions* options = [[MTLCompileOptions new] autorelease];
  options.languageVersion = language_version();
  if (__builtin_available(macOS 15.0, *)) {
    options.mathMode = is_safe ? MTLMathModeSafe : (is_fast ? MTLMathModeFast : MTLMathModeRelaxed);
    options.mathFloatingPointFunctions =
        is_fast ? MTLMathFloatingPointFunctionsFast : MTLMathFloatingPointFunctionsPrecise;
  } else {
    options.fastMathEnabled = !is_safe;
  }
  return options;
}

}  // namespace quantization_mlx::metal
