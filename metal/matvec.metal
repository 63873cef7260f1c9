// The kernels of matvec.h: qmv and qvm, their split-K and gathered forms, and sum_parts; and those of matvec_columns.h,
// which are the qvm of packed columns.
#include "instantiate.h"
#include "matvec.h"
#include "matvec_columns.h"

namespace quantization_mlx {

// affine_qmv_float16_gs_64_b_4 and, for up to 2, 3, 4, 6, 8 or 12 rows, affine_qmv_float16_gs_64_b_4_rows_2
#define QMV(mode, name, type, group_size, bits)                                                             \
  INSTANTIATE(KERNEL_NAME(mode, "qmv", name, group_size, bits), qmv<type, Mode::mode, group_size, bits, 1>) \
  QMV_ROWS(mode, name, type, group_size, bits, 2)                                                           \
  QMV_ROWS(mode, name, type, group_size, bits, 3)                                                           \
  QMV_ROWS(mode, name, type, group_size, bits, 4)                                                           \
  QMV_ROWS(mode, name, type, group_size, bits, 6)                                                           \
  QMV_ROWS(mode, name, type, group_size, bits, 8)                                                           \
  QMV_ROWS(mode, name, type, group_size, bits, 12)
#define QMV_ROWS(mode, name, type, group_size, bits, rows) \
  INSTANTIATE(                                             \
      KERNEL_NAME(mode, "qmv", name, group_size, bits) "_rows_" #rows, qmv<type, Mode::mode, group_size, bits, rows>)

#define GATHER_QMV(mode, name, type, group_size, bits)                                                            \
  INSTANTIATE(                                                                                                    \
      KERNEL_NAME(mode, "gather_qmv", name, group_size, bits), gather_qmv<type, Mode::mode, group_size, bits, 1>) \
  GATHER_QMV_ROWS(mode, name, type, group_size, bits, 4)                                                          \
  GATHER_QMV_ROWS(mode, name, type, group_size, bits, 8)                                                          \
  GATHER_QMV_ROWS(mode, name, type, group_size, bits, 12)
#define GATHER_QMV_ROWS(mode, name, type, group_size, bits, rows)             \
  INSTANTIATE(                                                                \
      KERNEL_NAME(mode, "gather_qmv", name, group_size, bits) "_rows_" #rows, \
      gather_qmv<type, Mode::mode, group_size, bits, rows>)

// affine_qvm_float16_gs_64_b_4 and, for up to 4 or 8 rows, affine_qvm_float16_gs_64_b_4_rows_4
#define QVM(mode, name, type, group_size, bits)              \
  QVM_ROWS(mode, "", name, type, group_size, bits, 1)        \
  QVM_ROWS(mode, "_rows_4", name, type, group_size, bits, 4) \
  QVM_ROWS(mode, "_rows_8", name, type, group_size, bits, 8)
#define QVM_ROWS(mode, suffix, name, type, group_size, bits, rows) \
  QVM_KERNELS(mode, suffix, qvm, gather_qvm, name, type, group_size, bits, rows)
#define QVM_KERNELS(mode, suffix, plain, gathered, name, type, group_size, bits, rows)                                \
  INSTANTIATE(                                                                                                        \
      KERNEL_NAME(mode, "qvm", name, group_size, bits) suffix, plain<type, Mode::mode, group_size, bits, rows, type>) \
  INSTANTIATE(                                                                                                        \
      KERNEL_NAME(mode, "qvm_splitk", name, group_size, bits) suffix,                                                 \
      plain<type, Mode::mode, group_size, bits, rows, float>)                                                         \
  INSTANTIATE(                                                                                                        \
      KERNEL_NAME(mode, "gather_qvm", name, group_size, bits) suffix,                                                 \
      gathered<type, Mode::mode, group_size, bits, rows>)

// marlin_fp4_qvm_float16_gs_128_b_4 and so on.
#define QVM_COLUMNS(mode, name, type, group_size, bits)              \
  QVM_COLUMNS_ROWS(mode, "", name, type, group_size, bits, 1)        \
  QVM_COLUMNS_ROWS(mode, "_rows_4", name, type, group_size, bits, 4) \
  QVM_COLUMNS_ROWS(mode, "_rows_8", name, type, group_size, bits, 8)
#define QVM_COLUMNS_ROWS(mode, suffix, name, type, group_size, bits, rows) \
  QVM_KERNELS(mode, suffix, column_qvm, gather_column_qvm, name, type, group_size, bits, rows)

// sum_parts_float16
#define ALL(name, type)                           \
  FOR_EACH_FORMAT(QMV, name, type)                \
  FOR_EACH_FORMAT(GATHER_QMV, name, type)         \
  FOR_EACH_FORMAT(QVM, name, type)                \
  FOR_EACH_COLUMN_FORMAT(QVM_COLUMNS, name, type) \
  INSTANTIATE("sum_parts_" #name, sum_parts<type>)
FOR_EACH_TYPE(ALL)

}  // namespace quantization_mlx
