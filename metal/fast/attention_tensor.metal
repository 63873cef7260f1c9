// The kernels of attention_tensor.h, where the language and the SDK have tensor operations. No float32: the matrix
// units would round it to ten bits of mantissa.

// Before any include: see metal.h.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

#include "attention_tensor.h"

// --- Instances -----------------------------------------------------------------------------------------------------

#include "../../csrc/gpu/kernels.h"
#include "../common/instantiate.h"

#if QUANTIZATION_MLX_TENSOR_OPS

namespace quantization_mlx {

#define KERNELS_OF(KERNEL, type_name, T) ATTENTION_TENSOR_KERNELS(KERNEL, "_" #type_name, T)
FOR_EACH_HALF_TYPE(KERNELS_OF, INSTANTIATE)

}  // namespace quantization_mlx

#endif
