// The kernels of moe.h.

// Before any include: see metal.h.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

#include "moe.h"

// --- Instances -----------------------------------------------------------------------------------------------------

#include "../../csrc/gpu/kernels.h"
#include "../common/instantiate.h"

namespace quantization_mlx {

#define KERNELS_OF(KERNEL, type_name, T) MOE_KERNELS(KERNEL, "_" #type_name, T)
FOR_EACH_HALF_TYPE(KERNELS_OF, INSTANTIATE)
FOR_FLOAT(KERNELS_OF, INSTANTIATE)

#define HALF_KERNELS_OF(KERNEL, type_name, T) MOE_HALF_KERNELS(KERNEL, "_" #type_name, T)
FOR_EACH_HALF_TYPE(HALF_KERNELS_OF, INSTANTIATE)

}  // namespace quantization_mlx
