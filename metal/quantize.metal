// The kernels of quantize.h: affine_quantize_float16_gs_64_b_4, affine_dequantize_float16_gs_64_b_4 and so on, and
// their equals of packed columns.
#include "instantiate.h"
#include "quantize.h"

namespace quantization_mlx {

#define QUANTIZE(mode, name, type, group_size, bits)                                                               \
  INSTANTIATE(KERNEL_NAME(mode, "quantize", name, group_size, bits), quantize<type, Mode::mode, group_size, bits>) \
  INSTANTIATE(KERNEL_NAME(mode, "dequantize", name, group_size, bits), dequantize<type, Mode::mode, group_size, bits>)

#define QUANTIZE_COLUMNS(mode, name, type, group_size, bits)                                                       \
  INSTANTIATE(                                                                                                     \
      KERNEL_NAME(mode, "quantize", name, group_size, bits), quantize_columns<type, Mode::mode, group_size, bits>) \
  INSTANTIATE(                                                                                                     \
      KERNEL_NAME(mode, "dequantize", name, group_size, bits), dequantize_columns<type, Mode::mode, group_size, bits>)

#define ALL(name, type)                 \
  FOR_EACH_FORMAT(QUANTIZE, name, type) \
  FOR_EACH_COLUMN_FORMAT(QUANTIZE_COLUMNS, name, type)
FOR_EACH_TYPE(ALL)

}  // namespace quantization_mlx
