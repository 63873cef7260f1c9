// The kernels of matvec.h: qmv and qvm, their split-K and gathered forms; and those of matvec_columns.h, which are the
// qvm of packed columns.

// Before any include: see metal.h.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

#include "matvec.h"
#include "matvec_columns.h"

// --- Instances -----------------------------------------------------------------------------------------------------

#include "formats.h"

namespace quantization_mlx {

FOR_EACH_HALF_TYPE(KERNELS_OF_HALF, MATVEC)
FOR_FLOAT(KERNELS_OF_FLOAT, MATVEC)

}  // namespace quantization_mlx
