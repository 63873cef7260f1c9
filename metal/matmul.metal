// The kernels of matmul.h: qmm_t (w transposed) and qmm_n (not, or of packed columns), their split-K and gathered
// forms.
#include "instantiate.h"
#include "matmul.h"

namespace quantization_mlx {

// affine_qmm_t_float16_gs_64_b_4_rows_32
#define QMM(mode, op, name, type, group_size, bits, rows, transpose, y) \
  INSTANTIATE(                                                          \
      KERNEL_NAME(mode, op, name, group_size, bits) "_rows_" #rows,     \
      qmm<type, Mode::mode, group_size, bits, rows, transpose, y>)
#define GATHER(mode, op, function, name, type, group_size, bits, transpose) \
  INSTANTIATE(                                                              \
      KERNEL_NAME(mode, op, name, group_size, bits) "_rows_32",             \
      function<type, Mode::mode, group_size, bits, 32, transpose>)

#define ROWS(mode, op, name, type, group_size, bits, rows, transpose)      \
  QMM(mode, "qmm" op, name, type, group_size, bits, rows, transpose, type) \
  QMM(mode, "qmm" op "_splitk", name, type, group_size, bits, rows, transpose, float)
#define TILES(mode, op, name, type, group_size, bits, transpose)                     \
  ROWS(mode, op, name, type, group_size, bits, 16, transpose)                        \
  ROWS(mode, op, name, type, group_size, bits, 32, transpose)                        \
  ROWS(mode, op, name, type, group_size, bits, 64, transpose)                        \
  GATHER(mode, "gather_qmm" op, gather_qmm, name, type, group_size, bits, transpose) \
  GATHER(mode, "gather_qmm_rhs" op, gather_qmm_rhs, name, type, group_size, bits, transpose)

#define MATMUL(mode, name, type, group_size, bits)      \
  TILES(mode, "_t", name, type, group_size, bits, true) \
  TILES(mode, "_n", name, type, group_size, bits, false)

// Where columns are packed, blocks of w are laid out as transposed ones: see tile.h.
#define MATMUL_COLUMNS(mode, name, type, group_size, bits) TILES(mode, "_n", name, type, group_size, bits, true)

#define ALL(name, type)               \
  FOR_EACH_FORMAT(MATMUL, name, type) \
  FOR_EACH_COLUMN_FORMAT(MATMUL_COLUMNS, name, type)
FOR_EACH_TYPE(ALL)

}  // namespace quantization_mlx
