// All kernels of a table of kernels.h for every format of formats.h, for a library that is compiled beforehand.
#pragma once

#include "../../csrc/formats.h"
#include "../../csrc/gpu/kernels.h"
#include "../common/instantiate.h"

// KERNELS: the name of a table without rows or columns at its end.
#define FOR_EACH_FORMAT(KERNELS, type_name, T) QUANTIZATION_MLX_MODES(EACH_MODE, KERNELS, type_name, T)
#define EACH_MODE(mode, packing, element, scale, offset, zero, sizes, widths, size, bits, KERNELS, type_name, T) \
  QUANTIZATION_MLX_##sizes(EACH_GROUP_SIZE, widths, KERNELS##packing, mode, type_name, T)
#define EACH_GROUP_SIZE(group_size, widths, KERNELS, mode, type_name, T) \
  QUANTIZATION_MLX_##widths(EACH_WIDTH, group_size, KERNELS, mode, type_name, T)
#define EACH_WIDTH(bits, group_size, KERNELS, mode, type_name, T) \
  KERNELS(INSTANTIATE, #mode "_", "_" #type_name "_gs_" #group_size "_b_" #bits, T, Mode::mode, group_size, bits)
