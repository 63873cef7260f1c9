// The kernels of quantize.h: affine_quantize_float16_gs_64_b_4, affine_dequantize_float16_gs_64_b_4 and so on, and
// their equals of packed columns.
#include "quantize.h"

// --- Instances -----------------------------------------------------------------------------------------------------

#include "formats.h"

namespace quantization_mlx {

#define ALL(type_name, T) FOR_EACH_FORMAT(QUANTIZE_KERNELS_, type_name, T)
FOR_EACH_TYPE(ALL)

}  // namespace quantization_mlx
