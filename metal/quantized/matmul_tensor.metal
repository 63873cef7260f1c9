// The kernels of matmul_tensor.h, where the language and the SDK have tensor operations: qmm and the sorted gather. No
// float32: the matrix units would round it to ten bits of mantissa.

// Before any include: see metal.h.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

#include "matmul_tensor.h"

// --- Instances -----------------------------------------------------------------------------------------------------

#include "formats.h"

#if QUANTIZATION_MLX_TENSOR_OPS

namespace quantization_mlx {

FOR_EACH_HALF_TYPE(KERNELS_OF_HALF, TENSOR)

}  // namespace quantization_mlx

#endif
