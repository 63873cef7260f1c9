// Metal's library, for all shaders. Infinity and NaN are values: the pragma stands before the library's headers because
// it holds for what follows. Metal 3.1 does not know it; there the host asks for safe arithmetic.
#pragma once

#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

#include <metal_stdlib>

namespace quantization_mlx {

using namespace metal;

}  // namespace quantization_mlx
