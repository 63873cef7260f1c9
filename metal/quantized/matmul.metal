// The kernels of matmul.h: qmm_t (w transposed) and qmm_n (not, or of packed columns), their split-K and gathered
// forms.

// Before any include: see metal.h.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

#include "matmul.h"

// --- Instances -----------------------------------------------------------------------------------------------------

#include "formats.h"

namespace quantization_mlx {

FOR_EACH_HALF_TYPE(KERNELS_OF_HALF, MATMUL)
FOR_FLOAT(KERNELS_OF_FLOAT, MATMUL)

}  // namespace quantization_mlx
