// Metal's library, for all shaders. Helpers are METAL_FUNC, as its own functions are: inlined always, because a call
// would pass what a lane holds through memory.
//
// Infinity and NaN are values. So every .metal file begins with the pragma for safe arithmetic, before any include: the
// library's functions are compiled by what stands before them. Metal 3.1 does not know it; there the host asks for it.
#pragma once

#include <metal_stdlib>

namespace quantization_mlx {

using namespace metal;

}  // namespace quantization_mlx
