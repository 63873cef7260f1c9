// The kernels of matvec.h: qmv and qvm, their split-K and gathered forms, and sum_parts; and those of matvec_columns.h,
// which are the qvm of packed columns.

// Before any include: see metal.h.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

#include "matvec.h"
#include "matvec_columns.h"

// --- Instances -----------------------------------------------------------------------------------------------------

#include "formats.h"

namespace quantization_mlx {

#define ALL(type_name, T)                        \
  FOR_EACH_FORMAT(MATVEC_KERNELS_, type_name, T) \
  SUM_KERNELS(INSTANTIATE, "_" #type_name, T)
FOR_EACH_TYPE(ALL)

}  // namespace quantization_mlx
