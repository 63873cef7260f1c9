// How this package has Metal compile source. Objective-C++.
#pragma once

#import <Metal/Metal.h>

#include <string_view>

namespace quantization_mlx::metal {

id<MTLDevice> mtl_device();

// Never null.
const char* text_of(NSError* error);

// The newest language that this release of macOS compiles. math_mode: "safe", "relaxed" or "fast", the two of which are
// one before macOS 15. Raises ValueError for another one.
MTLCompileOptions* compile_options(std::string_view math_mode);

}  // namespace quantization_mlx::metal
