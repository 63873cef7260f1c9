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

#define ALL(type_name, T) FOR_EACH_FORMAT(MATMUL_KERNELS_, type_name, T)
FOR_EACH_TYPE(ALL)

}  // namespace quantization_mlx
