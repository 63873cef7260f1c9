// The kernels of a library that is compiled beforehand, by the tables of kernels.h. FILE: their names before _KERNELS.
//
// All formats in all types are more than four thousand, of which nearly all models use the few below. The others are
// compiled from their source when they are first used, as all are where there is no such library. With
// QUANTIZATION_MLX_ALL_KERNELS, for the tests, all of them are instantiated.
#pragma once

#include "../../csrc/formats.h"
#include "../../csrc/gpu/kernels.h"
#include "../common/instantiate.h"

// KERNELS: a table of kernels.h.
#define FORMAT_KERNELS(mode, group_size, bits, KERNELS, type_name, T) \
  KERNELS(INSTANTIATE, #mode "_", "_" #type_name "_gs_" #group_size "_b_" #bits, T, Mode::mode, group_size, bits)

#ifdef QUANTIZATION_MLX_ALL_KERNELS

// KERNELS: the name of a table without rows or columns at its end.
#define FOR_EACH_FORMAT(KERNELS, type_name, T) QUANTIZATION_MLX_MODES(EACH_MODE, KERNELS, type_name, T)
#define EACH_MODE(mode, packing, element, scale, offset, zero, sizes, widths, size, bits, KERNELS, type_name, T) \
  QUANTIZATION_MLX_##sizes(EACH_GROUP_SIZE, widths, KERNELS##packing, mode, type_name, T)
#define EACH_GROUP_SIZE(group_size, widths, KERNELS, mode, type_name, T) \
  QUANTIZATION_MLX_##widths(EACH_WIDTH, group_size, KERNELS, mode, type_name, T)
#define EACH_WIDTH(bits, group_size, KERNELS, mode, type_name, T) \
  FORMAT_KERNELS(mode, group_size, bits, KERNELS, type_name, T)

#define KERNELS_OF_HALF(FILE, type_name, T) FOR_EACH_FORMAT(FILE##_KERNELS_, type_name, T)
#define KERNELS_OF_FLOAT(FILE, type_name, T) FOR_EACH_FORMAT(FILE##_KERNELS_, type_name, T)

#else

// EACH(mode, group_size, bits, ...): what models are published in; what is the default, and near it; and Marlin's
// defaults.
// clang-format off
#define PUBLISHED_FORMATS(EACH, ...)                                                                 \
  EACH(affine, 64, 3, __VA_ARGS__) EACH(affine, 64, 4, __VA_ARGS__) EACH(affine, 64, 5, __VA_ARGS__) \
  EACH(affine, 64, 6, __VA_ARGS__) EACH(affine, 64, 8, __VA_ARGS__) EACH(affine, 32, 4, __VA_ARGS__) \
  EACH(mxfp4, 32, 4, __VA_ARGS__) EACH(mxfp8, 32, 8, __VA_ARGS__) EACH(nvfp4, 16, 4, __VA_ARGS__)
#define DEFAULT_FORMATS(EACH, ...) EACH(affine, 64, 4, __VA_ARGS__) EACH(affine, 64, 8, __VA_ARGS__)
#define MARLIN_FORMATS(EACH, ...)                                                     \
  EACH(marlin_fp4, 128, 4, __VA_ARGS__) EACH(marlin_fp8, 128, 8, __VA_ARGS__)         \
  EACH(marlin_int2, 128, 2, __VA_ARGS__) EACH(marlin_int4, 128, 4, __VA_ARGS__)       \
  EACH(marlin_int4_sym, 128, 4, __VA_ARGS__)
// clang-format on

#define KERNELS_OF_HALF(FILE, type_name, T)                                 \
  PUBLISHED_FORMATS(FORMAT_KERNELS, FILE##_KERNELS_inference, type_name, T) \
  DEFAULT_FORMATS(FORMAT_KERNELS, FILE##_KERNELS_training, type_name, T)    \
  MARLIN_FORMATS(FORMAT_KERNELS, FILE##_KERNELS_columns, type_name, T)
#define KERNELS_OF_FLOAT(FILE, type_name, T) DEFAULT_FORMATS(FORMAT_KERNELS, FILE##_KERNELS_inference, type_name, T)

#endif
