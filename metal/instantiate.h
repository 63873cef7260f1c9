// Tables of kernels: which formats and types there are, and how a kernel's name tells its specification.
//
// A library is compiled for one type with -D QUANTIZATION_MLX_TYPES=1 (float32), 2 (float16) or 4 (bfloat16), or for
// their sum; for one mode with -D QUANTIZATION_MLX_MODES=1 (affine), 2 (mxfp4), 4 (mxfp8) or 8 (nvfp4). Default: all.
#pragma once

#ifndef QUANTIZATION_MLX_TYPES
#define QUANTIZATION_MLX_TYPES 7
#endif
#ifndef QUANTIZATION_MLX_MODES
#define QUANTIZATION_MLX_MODES 15
#endif

// clang-format off
#define INSTANTIATE(name, ...) \
  template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
// clang-format on

// affine_qmv_float16_gs_64_b_4
#define KERNEL_NAME(mode, op, type, group_size, bits) #mode "_" op "_" #type "_gs_" #group_size "_b_" #bits

// EACH(mode, type name, type, group_size, bits) for every format.
#define AFFINE_WIDTHS(EACH, name, type, group_size) \
  EACH(affine, name, type, group_size, 2)           \
  EACH(affine, name, type, group_size, 3)           \
  EACH(affine, name, type, group_size, 4)           \
  EACH(affine, name, type, group_size, 5)           \
  EACH(affine, name, type, group_size, 6)           \
  EACH(affine, name, type, group_size, 8)

#if QUANTIZATION_MLX_MODES & 1
#define AFFINE_FORMATS(EACH, name, type) \
  AFFINE_WIDTHS(EACH, name, type, 32)    \
  AFFINE_WIDTHS(EACH, name, type, 64)    \
  AFFINE_WIDTHS(EACH, name, type, 128)
#else
#define AFFINE_FORMATS(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 2
#define MXFP4_FORMATS(EACH, name, type) EACH(mxfp4, name, type, 32, 4)
#else
#define MXFP4_FORMATS(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 4
#define MXFP8_FORMATS(EACH, name, type) EACH(mxfp8, name, type, 32, 8)
#else
#define MXFP8_FORMATS(EACH, name, type)
#endif
#if QUANTIZATION_MLX_MODES & 8
#define NVFP4_FORMATS(EACH, name, type) EACH(nvfp4, name, type, 16, 4)
#else
#define NVFP4_FORMATS(EACH, name, type)
#endif

#define FOR_EACH_FORMAT(EACH, name, type) \
  AFFINE_FORMATS(EACH, name, type)        \
  MXFP4_FORMATS(EACH, name, type)         \
  MXFP8_FORMATS(EACH, name, type)         \
  NVFP4_FORMATS(EACH, name, type)

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
