// Tables of kernels: which formats and types there are, and how a kernel's name tells its specification.
//
// A library is compiled for what these bit masks name; everything, unless they are given:
//   QUANTIZATION_MLX_TYPES        1 float32, 2 float16, 4 bfloat16
//   QUANTIZATION_MLX_MODES        1 affine, 2 mxfp4, 4 mxfp8, 8 nvfp4, 16 marlin_fp4, 32 marlin_fp8, 64 marlin_int2,
//                                 128 marlin_int4, 256 marlin_int4_sym
//   QUANTIZATION_MLX_GROUP_SIZES  1 for 16, 2 for 32, 4 for 64, 8 for 128
//   QUANTIZATION_MLX_BITS         1 << bits
#pragma once

#ifndef QUANTIZATION_MLX_TYPES
#define QUANTIZATION_MLX_TYPES 7
#endif
#ifndef QUANTIZATION_MLX_MODES
#define QUANTIZATION_MLX_MODES 0x1FF
#endif
#ifndef QUANTIZATION_MLX_GROUP_SIZES
#define QUANTIZATION_MLX_GROUP_SIZES 15
#endif
#ifndef QUANTIZATION_MLX_BITS
#define QUANTIZATION_MLX_BITS 0x17C
#endif

// clang-format off
#define INSTANTIATE(name, ...) \
  template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
// clang-format on

// affine_qmv_float16_gs_64_b_4
#define KERNEL_NAME(mode, op, type, group_size, bits) #mode "_" op "_" #type "_gs_" #group_size "_b_" #bits

// EACH(mode, type name, type, group_size, bits) for every format whose rows are packed.
#if QUANTIZATION_MLX_BITS & 4
#define AFFINE_WIDTH_2(EACH, name, type, group_size) EACH(affine, name, type, group_size, 2)
#else
#define AFFINE_WIDTH_2(EACH, name, type, group_size)
#endif
#if QUANTIZATION_MLX_BITS & 8
#define AFFINE_WIDTH_3(EACH, name, type, group_size) EACH(affine, name, type, group_size, 3)
#else
#define AFFINE_WIDTH_3(EACH, name, type, group_size)
#endif
#if QUANTIZATION_MLX_BITS & 16
#define AFFINE_WIDTH_4(EACH, name, type, group_size) EACH(affine, name, type, group_size, 4)
#else
#define AFFINE_WIDTH_4(EACH, name, type, group_size)
#endif
#if QUANTIZATION_MLX_BITS & 32
#define AFFINE_WIDTH_5(EACH, name, type, group_size) EACH(affine, name, type, group_size, 5)
#else
#define AFFINE_WIDTH_5(EACH, name, type, group_size)
#endif
#if QUANTIZATION_MLX_BITS & 64
#define AFFINE_WIDTH_6(EACH, name, type, group_size) EACH(affine, name, type, group_size, 6)
#else
#define AFFINE_WIDTH_6(EACH, name, type, group_size)
#endif
#if QUANTIZATION_MLX_BITS & 256
#define AFFINE_WIDTH_8(EACH, name, type, group_size) EACH(affine, name, type, group_size, 8)
#else
#define AFFINE_WIDTH_8(EACH, name, type, group_size)
#endif
#define AFFINE_WIDTHS(EACH, name, type, group_size) \
  AFFINE_WIDTH_2(EACH, name, type, group_size)      \
  AFFINE_WIDTH_3(EACH, name, type, group_size)      \
  AFFINE_WIDTH_4(EACH, name, type, group_size)      \
  AFFINE_WIDTH_5(EACH, name, type, group_size)      \
  AFFINE_WIDTH_6(EACH, name, type, group_size)      \
  AFFINE_WIDTH_8(EACH, name, type, group_size)

#if QUANTIZATION_MLX_MODES & 1 && QUANTIZATION_MLX_GROUP_SIZES & 2
#define AFFINE_GROUPS_32(EACH, name, type) AFFINE_WIDTHS(EACH, name, type, 32)
#else
#define AFFINE_GROUPS_32(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 1 && QUANTIZATION_MLX_GROUP_SIZES & 4
#define AFFINE_GROUPS_64(EACH, name, type) AFFINE_WIDTHS(EACH, name, type, 64)
#else
#define AFFINE_GROUPS_64(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 1 && QUANTIZATION_MLX_GROUP_SIZES & 8
#define AFFINE_GROUPS_128(EACH, name, type) AFFINE_WIDTHS(EACH, name, type, 128)
#else
#define AFFINE_GROUPS_128(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 2 && QUANTIZATION_MLX_GROUP_SIZES & 2 && QUANTIZATION_MLX_BITS & 16
#define MXFP4_FORMAT(EACH, name, type) EACH(mxfp4, name, type, 32, 4)
#else
#define MXFP4_FORMAT(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 4 && QUANTIZATION_MLX_GROUP_SIZES & 2 && QUANTIZATION_MLX_BITS & 256
#define MXFP8_FORMAT(EACH, name, type) EACH(mxfp8, name, type, 32, 8)
#else
#define MXFP8_FORMAT(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 8 && QUANTIZATION_MLX_GROUP_SIZES & 1 && QUANTIZATION_MLX_BITS & 16
#define NVFP4_FORMAT(EACH, name, type) EACH(nvfp4, name, type, 16, 4)
#else
#define NVFP4_FORMAT(EACH, name, type)
#endif

#define FOR_EACH_FORMAT(EACH, name, type) \
  AFFINE_GROUPS_32(EACH, name, type)      \
  AFFINE_GROUPS_64(EACH, name, type)      \
  AFFINE_GROUPS_128(EACH, name, type)     \
  MXFP4_FORMAT(EACH, name, type)          \
  MXFP8_FORMAT(EACH, name, type)          \
  NVFP4_FORMAT(EACH, name, type)

// EACH(mode, type name, type, group_size, bits) for every format whose columns are packed.
#if QUANTIZATION_MLX_GROUP_SIZES & 2
#define COLUMN_GROUPS_32(EACH, mode, name, type, bits) EACH(mode, name, type, 32, bits)
#else
#define COLUMN_GROUPS_32(EACH, mode, name, type, bits)
#endif
#if QUANTIZATION_MLX_GROUP_SIZES & 4
#define COLUMN_GROUPS_64(EACH, mode, name, type, bits) EACH(mode, name, type, 64, bits)
#else
#define COLUMN_GROUPS_64(EACH, mode, name, type, bits)
#endif
#if QUANTIZATION_MLX_GROUP_SIZES & 8
#define COLUMN_GROUPS_128(EACH, mode, name, type, bits) EACH(mode, name, type, 128, bits)
#else
#define COLUMN_GROUPS_128(EACH, mode, name, type, bits)
#endif
#define COLUMN_GROUPS(EACH, mode, name, type, bits) \
  COLUMN_GROUPS_32(EACH, mode, name, type, bits)    \
  COLUMN_GROUPS_64(EACH, mode, name, type, bits)    \
  COLUMN_GROUPS_128(EACH, mode, name, type, bits)

#if QUANTIZATION_MLX_MODES & 16 && QUANTIZATION_MLX_BITS & 16
#define MARLIN_FP4_FORMATS(EACH, name, type) COLUMN_GROUPS(EACH, marlin_fp4, name, type, 4)
#else
#define MARLIN_FP4_FORMATS(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 32 && QUANTIZATION_MLX_BITS & 256
#define MARLIN_FP8_FORMATS(EACH, name, type) COLUMN_GROUPS(EACH, marlin_fp8, name, type, 8)
#else
#define MARLIN_FP8_FORMATS(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 64 && QUANTIZATION_MLX_BITS & 4
#define MARLIN_INT2_FORMATS(EACH, name, type) COLUMN_GROUPS(EACH, marlin_int2, name, type, 2)
#else
#define MARLIN_INT2_FORMATS(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 128 && QUANTIZATION_MLX_BITS & 16
#define MARLIN_INT4_FORMATS(EACH, name, type) COLUMN_GROUPS(EACH, marlin_int4, name, type, 4)
#else
#define MARLIN_INT4_FORMATS(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 256 && QUANTIZATION_MLX_BITS & 16
#define MARLIN_INT4_SYM_FORMATS(EACH, name, type) COLUMN_GROUPS(EACH, marlin_int4_sym, name, type, 4)
#else
#define MARLIN_INT4_SYM_FORMATS(EACH, name, type)
#endif

#define FOR_EACH_COLUMN_FORMAT(EACH, name, type) \
  MARLIN_FP4_FORMATS(EACH, name, type)           \
  MARLIN_FP8_FORMATS(EACH, name, type)           \
  MARLIN_INT2_FORMATS(EACH, name, type)          \
  MARLIN_INT4_FORMATS(EACH, name, type)          \
  MARLIN_INT4_SYM_FORMATS(EACH, name, type)

// EACH(type name, type) for every type.
#if QUANTIZATION_MLX_TYPES & 1
#define FLOAT32_TYPE(EACH) EACH(float32, float)
#else
#define FLOAT32_TYPE(EACH)
#endif
#if QUANTIZATION_MLX_TYPES & 2
#define FLOAT16_TYPE(EACH) EACH(float16, half)
#else
#define FLOAT16_TYPE(EACH)
#endif
#if QUANTIZATION_MLX_TYPES & 4
#define BFLOAT16_TYPE(EACH) EACH(bfloat16, bfloat)
#else
#define BFLOAT16_TYPE(EACH)
#endif

#define FOR_EACH_TYPE(EACH) \
  FLOAT32_TYPE(EACH)        \
  FLOAT16_TYPE(EACH)        \
  BFLOAT16_TYPE(EACH)
