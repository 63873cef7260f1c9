// The kernels of quantize.h: affine_quantize_float16_gs_64_b_4, affine_dequantize_float16_gs_64_b_4 and so on, and
// their equals of packed columns.

// Before any include: see metal.h.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif
// Codes are those of the CPU bit for bit: no fused operations, either.
#pragma METAL fp contract(off)

#include "quantize.h"

// --- Instances -----------------------------------------------------------------------------------------------------

#include "formats.h"

namespace quantization_mlx {

FOR_EACH_HALF_TYPE(KERNELS_OF_HALF, QUANTIZE)
FOR_FLOAT(KERNELS_OF_FLOAT, QUANTIZE)

}  // namespace quantization_mlx
