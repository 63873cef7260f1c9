// The kernels of image.h.

// Before any include: see metal.h.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

#include "image.h"

// --- Instances -----------------------------------------------------------------------------------------------------

#include "../../csrc/gpu/kernels.h"
#include "../common/instantiate.h"

namespace quantization_mlx {

#define KERNELS_OF(KERNEL, type_name, T) IMAGE_KERNELS(KERNEL, "_" #type_name, T)
FOR_EACH_HALF_TYPE(KERNELS_OF, INSTANTIATE)
FOR_FLOAT(KERNELS_OF, INSTANTIATE)
KERNELS_OF(INSTANTIATE, uint8, uchar)

}  // namespace quantization_mlx
