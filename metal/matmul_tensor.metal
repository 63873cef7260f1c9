// The kernels of matmul_tensor.h, where the language and the SDK have tensor operations: qmm and the sorted gather. No
// float32: the matrix units would round it to ten bits of mantissa.
#include "instantiate.h"
#include "matmul_tensor.h"

#if QUANTIZATION_MLX_TENSOR_OPS

namespace quantization_mlx {

// affine_qmm_t_nax_float16_gs_64_b_4_rows_64
#define QMM_NAX(mode, op, name, type, group_size, bits, rows, transpose) \
  INSTANTIATE(                                                           \
      KERNEL_NAME(mode, op, name, group_size, bits) "_rows_" #rows,      \
      qmm_nax<type, Mode::mode, group_size, bits, rows, transpose>)
#define GATHER_NAX(mode, op, name, type, group_size, bits, transpose) \
  INSTANTIATE(                                                        \
      KERNEL_NAME(mode, op, name, group_size, bits) "_rows_32",       \
      gather_qmm_rhs_nax<type, Mode::mode, group_size, bits, transpose>)

#define NAX(mode, name, type, group_size, bits)                                \
  QMM_NAX(mode, "qmm_t_nax", name, type, group_size, bits, 32, true)           \
  QMM_NAX(mode, "qmm_t_nax", name, type, group_size, bits, 64, true)           \
  QMM_NAX(mode, "qmm_n_nax", name, type, group_size, bits, 32, false)          \
  QMM_NAX(mode, "qmm_n_nax", name, type, group_size, bits, 64, false)          \
  GATHER_NAX(mode, "gather_qmm_rhs_t_nax", name, type, group_size, bits, true) \
  GATHER_NAX(mode, "gather_qmm_rhs_n_nax", name, type, group_size, bits, false)

// Where columns are packed, blocks of w are laid out as transposed ones: see tile.h.
#define NAX_COLUMNS(mode, name, type, group_size, bits)              \
  QMM_NAX(mode, "qmm_n_nax", name, type, group_size, bits, 32, true) \
  QMM_NAX(mode, "qmm_n_nax", name, type, group_size, bits, 64, true) \
  GATHER_NAX(mode, "gather_qmm_rhs_n_nax", name, type, group_size, bits, true)

#define ALL(name, type)            \
  FOR_EACH_FORMAT(NAX, name, type) \
  FOR_EACH_COLUMN_FORMAT(NAX_COLUMNS, name, type)
FLOAT16_TYPE(ALL)
BFLOAT16_TYPE(ALL)

}  // namespace quantization_mlx

#endif
